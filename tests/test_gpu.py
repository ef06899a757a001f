"""The main path on a GPU. `python -m pytest tests/test_gpu.py`, where there is one."""

import copy
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tiny
from sfa_peft import SFAConfig, search_ticket, ticket_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

DEVICE = torch.device("cuda")
EVERYWHERE = ("attention", "mlp", "mlp_parallel", "block")


ARCHITECTURES = [tiny.swin, tiny.dinov2]
every_architecture = pytest.mark.parametrize("make", ARCHITECTURES, ids=lambda make: make.__name__)


def config(**changes):
    return SFAConfig(**{"budget": 0.1, "external_places": EVERYWHERE, "modules_to_save": ["decode_head"]} | changes)


def on_device(batch):
    return {name: tensor.to(DEVICE) for name, tensor in batch.items()}


BATCHES = [tiny.batch(seed=seed) for seed in range(3)]


def train(model, steps=3, autocast=None, scaler=None):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for seed in range(steps):
        with torch.autocast("cuda", autocast or torch.float32, enabled=autocast is not None):
            loss = model(**on_device(tiny.batch(seed=seed))).loss
        assert torch.isfinite(loss)
        if scaler is None:
            loss.backward()
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad()
    return model.eval()


def output(model):
    return tiny.output(model, tiny.pixels().to(DEVICE))


def assert_on_device(model):
    assert {n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.device.type != "cuda"} == set()


@every_architecture
@pytest.mark.parametrize("order", ["to, inject", "inject, to"])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_the_main_path(make, order, granularity, tmp_path):
    base = make()
    changes = {"internal_granularity": granularity}
    if order == "to, inject":
        model = get_peft_model(copy.deepcopy(base).to(DEVICE), config(**changes))
    else:
        model = get_peft_model(copy.deepcopy(base), config(**changes)).to(DEVICE)
    base.to(DEVICE)
    assert_on_device(model)
    assert torch.equal(output(model), output(base))

    report = search_ticket(model, BATCHES, steps=12, progress=False)
    assert ticket_of(model).overlap(report.ticket) == 1
    assert torch.equal(output(model), output(base))
    train(model)
    trained = output(model)
    assert not torch.equal(trained, output(base))

    with model.disable_adapter():
        assert torch.equal(output(model), output(base))
    before = tiny.state(model.base_model.model)
    model.merge_adapter()
    assert torch.allclose(output(model), trained, rtol=1e-3, atol=1e-3)
    model.unmerge_adapter()
    assert tiny.same_state(tiny.state(model.base_model.model), before)

    model.save_pretrained(tmp_path)
    for device in (DEVICE, torch.device("cpu")):
        loaded = PeftModel.from_pretrained(make().to(device), tmp_path)
        assert torch.allclose(tiny.output(loaded, tiny.pixels().to(device)).cpu(), trained.cpu(), rtol=1e-3, atol=1e-3)
    loaded = PeftModel.from_pretrained(make().to(DEVICE), tmp_path, low_cpu_mem_usage=True)
    assert_on_device(loaded)
    assert torch.equal(output(loaded), trained)
    loaded.load_adapter(tmp_path, "second")
    assert_on_device(loaded)
    assert torch.equal(output(model.unload()), output(base))


@every_architecture
def test_places_chosen_by_the_search(make):
    model = get_peft_model(make().to(DEVICE), config(external_placement="auto", budget=0.3))
    search_ticket(model, BATCHES, steps=12, rounds=2, rewind=False, optimizer_state="bf16", progress=False)
    assert_on_device(model)
    train(model)


@every_architecture
def test_mixed_batches(make):
    model = get_peft_model(make().to(DEVICE), config(init_weights=False))
    model.add_adapter("second", config(init_weights=False, budget=0.05))
    assert_on_device(model)
    names = ["default", "second", "__base__", "default"]
    x = tiny.pixels(len(names)).to(DEVICE)
    model.eval()
    with torch.no_grad():
        mixed = model(x, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    expected = model(x[i : i + 1]).logits
            else:
                model.set_adapter(name)
                expected = model(x[i : i + 1]).logits
            assert torch.allclose(mixed[i : i + 1], expected, rtol=1e-3, atol=1e-3)


@every_architecture
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("where", ["autocast", "base"])
def test_half_precision(make, dtype, where):
    base = make().to(DEVICE)
    model = get_peft_model(base if where == "autocast" else base.to(dtype), config())
    if where == "base":
        model.eval()
        assert model(tiny.pixels().to(DEVICE, dtype)).logits.dtype == dtype
        return
    scaler = torch.amp.GradScaler("cuda") if dtype == torch.float16 else None
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    train(model, autocast=dtype, scaler=scaler)
    after = [p for p in model.parameters() if p.requires_grad]
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


def waits(run):
    """How often something waits for the GPU."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            run()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(w.message) for w in caught)


class Scored(nn.Module):
    """A backbone with a loss that waits for nothing."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone

    def forward(self, x):
        return self.backbone(x).last_hidden_state.square().mean()


@pytest.mark.parametrize("make", [tiny.vit, tiny.dinov3, tiny.dinov2_with_registers, tiny.swinv2])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_no_step_waits_for_the_gpu_that_the_base_does_not(make, granularity):
    x = tiny.pixels().to(DEVICE)

    def steps(model):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)

        def run():
            for _ in range(2):
                model(x).backward()
                optimizer.step()
                optimizer.zero_grad()

        run()  # what is made once
        return run

    base = Scored(make()).to(DEVICE).train()
    changes = {"modules_to_save": None, "internal_granularity": granularity}
    model = get_peft_model(Scored(make()).to(DEVICE), config(**changes)).train()
    assert waits(steps(model)) <= waits(steps(base))


def test_a_search_waits_for_the_gpu_every_tenth_step():
    x = tiny.pixels().to(DEVICE)

    def searching(steps):
        def run():
            search_ticket(model, [x], steps=steps, loss_fn=lambda model, x: model(x), progress=False)

        model = get_peft_model(Scored(tiny.vit()).to(DEVICE), config(modules_to_save=None))
        return run

    waits(searching(10))
    # Two for each look at the losses, of which there are two more.
    assert waits(searching(40)) - waits(searching(20)) <= 4
