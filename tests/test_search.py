import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, Dataset

import tiny
from sfa_peft import SFAConfig, SFALayer, TicketSearchError, search_ticket

BATCHES = [tiny.batch(seed=i) for i in range(3)]


def adapted(make=tiny.swin, **options):
    return get_peft_model(make(), SFAConfig(**{"budget": 0.1, "modules_to_save": ["decode_head"]} | options))


def search(model, data=BATCHES, **options):
    return search_ticket(model, data, **{"steps": 4, "progress": False} | options)


def positions(model, adapter="default"):
    return {
        f"{n}.{p}": m.sfa_internal[adapter].positions(p)
        for n, m in model.named_modules()
        if isinstance(m, SFALayer) and adapter in m.sfa_internal
        for p in m.sfa_internal[adapter].changed
    }


@pytest.mark.parametrize("granularity", ["element", "row"])
@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_the_search_installs_another_ticket_of_the_same_budget(make, granularity):
    model = adapted(make, internal_granularity=granularity)
    before = positions(model)
    trained = sum(p.numel() for n, p in model.named_parameters() if ".sfa_" in n)
    report = search(model)
    after = positions(model)
    assert after.keys() != before.keys() or any(not torch.equal(after[n], before[n]) for n in after)
    now = sum(p.numel() for n, p in model.named_parameters() if ".sfa_" in n)
    assert now == trained if granularity == "element" else abs(now - trained) < 70
    internal = sum(p.numel() for n, p in model.named_parameters() if ".sfa_internal." in n)
    assert report.ticket_size == internal
    assert sum(model.peft_config["default"].ticket_sizes.values()) == sum(len(p) for p in after.values())
    assert all(p.requires_grad for n, p in model.named_parameters() if ".sfa_" in n)


def test_everything_but_the_ticket_is_rewound():
    model = adapted()
    model.base_model.model.backbone.eval()  # a mixture of modes must come back as a mixture
    next(p for p in model.parameters() if p.requires_grad).grad = None
    before = {n: t.clone() for n, t in model.state_dict().items() if "sfa_internal" not in n}
    modes = {n: m.training for n, m in model.named_modules() if "sfa_" not in n and "layer" not in n}
    random_state = torch.get_rng_state()
    x = tiny.pixels()
    with torch.no_grad():
        expected = model(x).logits
    search(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n in before)
    base_names = [n.replace(".base_layer", "") for n in before]
    assert {n.replace(".base_layer", "") for n in model.state_dict() if "sfa_internal" not in n} == set(base_names)
    assert {n: m.training for n, m in model.named_modules() if n in modes} == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(x).logits, expected)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all(".sfa_" in n or "modules_to_save" in n for n in trainable)


def test_the_ticket_is_where_dense_training_moves_the_weights_most():
    model = adapted(external_share=0.0, budget=300)
    search(model, steps=3, seed=5)

    reference = tiny.swin()
    dense = adapted(external_share=0.0, budget=300)  # names the candidates
    names = [f"{m}.{p}" for m, own in dense.base_model.candidates("default").items() for p in own]
    parameters = dict(reference.named_parameters())
    before = {n: parameters[n].detach().clone() for n in names}
    for n, p in parameters.items():
        p.requires_grad_(n in before or "decode_head" in n)
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameters[n] for n in names], "lr": 5e-4},
            {"params": [p for n, p in parameters.items() if "decode_head" in n], "lr": 1e-3},
        ],
        weight_decay=0.0,
    )
    reference.train()
    for data in BATCHES:
        reference(**data).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = torch.cat([(parameters[n].detach() - before[n]).abs().reshape(-1) for n in names])
    expected = torch.zeros_like(moved, dtype=torch.bool)
    expected[moved.topk(300).indices] = True
    found, start = torch.zeros_like(expected), 0
    chosen = positions(model)
    for n in names:
        key = f"base_model.model.{n}"
        if key in chosen:
            found[start + chosen[key].long()] = True
        start += parameters[n].numel()
    # Equal but for scores that tie within rounding at the threshold.
    assert (found != expected).sum() <= 4


def test_the_same_search_gives_the_same_ticket_also_with_a_shuffling_loader():
    class Images(Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {k: v[0] for k, v in tiny.batch(1, seed=i).items()}

    found = []
    for _ in range(2):
        torch.rand(len(found) + 1)  # another global state
        model = adapted()
        search(model, DataLoader(Images(), batch_size=2, shuffle=True), seed=3)
        found.append(positions(model))
    assert tiny.same_state(*found)
    other = adapted()
    search(other, DataLoader(Images(), batch_size=2, shuffle=True), seed=4)
    assert not tiny.same_state(positions(other), found[0])


def test_only_the_named_adapter_gets_a_ticket():
    model = adapted()
    model.add_adapter("other", SFAConfig(budget=0.05))
    before = positions(model)
    search(model, adapter_name="other")
    assert tiny.same_state(positions(model), before)
    assert model.peft_config["other"].ticket_sizes
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".other." in n)


def test_after_the_search_the_model_trains_and_merges():
    model = adapted(external_places=["mlp_parallel"])
    search(model)
    tiny.train(model)
    expected = tiny.output(model)
    model.merge_adapter()
    assert torch.allclose(tiny.output(model), expected, atol=1e-6)


def test_a_loss_function_of_ones_own():
    model = get_peft_model(
        nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
        SFAConfig(budget=20, target_modules=["0", "2"], external_modules=[]),
    )
    data = [(torch.randn(5, 4), torch.randn(5, 2))]
    report = search(model, data, loss_fn=lambda m, b: nn.functional.mse_loss(m(b[0]), b[1]))
    assert report.ticket_size == 20
    assert report.losses[-1] < report.losses[0]


def test_the_report_is_a_table_by_stage_and_type():
    model = adapted()
    report = search(model)
    text = str(report)
    assert f"Ticket of {report.ticket_size:,} positions" in text
    assert "layers.0" in text
    assert "layers.1" in text
    for module_type in ("attention.q_proj", "mlp.fc1", "layernorm_before", "downsample.reduction"):
        assert module_type in text
    assert sum(s.chosen for s in report.shares) == report.ticket_size


def failing(match, error=TicketSearchError, model=None, **options):
    model = adapted() if model is None else model
    before, flags = tiny.state(model), [p.requires_grad for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    with pytest.raises(error, match=match):
        search(model, **options)
    assert tiny.same_state(tiny.state(model), before)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert not any(m.searching for m in model.modules() if isinstance(m, SFALayer))


def nan_after(step):
    calls = []

    def loss(model, batch):
        calls.append(0)
        return model(**batch).loss * (float("nan") if len(calls) > step else 1.0)

    return loss


def interrupt(model, batch):
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("gave no batch", {"data": []}),
        ("cannot be begun again, but steps=4", {"data": iter(BATCHES)}),
        ("no loss for a batch with .'pixel_values'.", {"data": [{"pixel_values": tiny.pixels()}]}),
        ("batch of type list", {"data": [[1, 2]]}),
        ("the loss was nan at step 2", {"loss_fn": nan_after(2)}),
    ],
)
def test_a_search_that_fails_says_why_and_changes_nothing(match, options):
    failing(match, **options)


def test_an_interrupted_search_changes_nothing():
    failing("^$", error=KeyboardInterrupt, loss_fn=interrupt)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("criterion='luck' is not known", {"criterion": "luck"}),
        ("steps=0", {"steps": 0}),
        ("learning_rate=-1", {"learning_rate": -1}),
        ("adapter_learning_rate=nan", {"adapter_learning_rate": float("nan")}),
        ("adapter_name='nobody'", {"adapter_name": "nobody"}),
    ],
)
def test_bad_arguments(match, options):
    failing(match, error=ValueError, **options)


def test_there_must_be_something_to_search_for():
    failing("no internal adapters", error=ValueError, model=adapted(external_share=1.0))
    failing("not zero any more", error=ValueError, model=tiny.train(adapted()))


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="got UperNetForSemanticSegmentation"):
        search(tiny.swin())
    with pytest.raises(TypeError, match="get_peft_model"):
        search(get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"])))
    with pytest.raises(TypeError, match="before the model is wrapped"):
        search(nn.DataParallel(adapted()))


def test_it_runs_in_the_accelerators_precision():
    model = adapted()
    dtypes = []

    def loss(model, batch):
        out = model(**batch)
        dtypes.append(
            model.base_model.model.backbone.swin.encoder.layers[0].blocks[0].mlp.fc1(torch.randn(1, 8)).dtype
        )
        return out.loss

    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        search(model, accelerator=Accelerator(mixed_precision="bf16"), loss_fn=loss, steps=1)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert dtypes == [torch.bfloat16]


def backbone_loss(model, batch):
    """Without the head's batch norm, which sees each process's half alone, gradients are the same mean."""
    return model.base_model.model.backbone(batch["pixel_values"]).feature_maps[0].square().mean()


@pytest.mark.slow
def test_two_processes_find_the_same_ticket_as_one(tmp_path):
    """Two gloo processes with half the batch each, against one process with whole batches."""
    script = Path(__file__).with_name("distributed_search.py")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{i}.pt") for i in range(2)]
    assert tiny.same_state(*ranks)

    model = adapted()
    both = [
        {k: torch.cat([tiny.batch(seed=2 * i)[k], tiny.batch(seed=2 * i + 1)[k]]) for k in ("pixel_values", "labels")}
        for i in range(2)
    ]
    # Without the head's batch norm, which sees each process's half alone, the gradients are the same mean.
    search(
        model,
        both,
        loss_fn=lambda m, b: m.base_model.model.backbone(b["pixel_values"]).feature_maps[0].square().mean(),
    )
    alone = positions(model)
    total = sum(len(p) for p in alone.values())
    common = sum(len(set(p.tolist()) & set(ranks[0].get(n, torch.tensor([])).tolist())) for n, p in alone.items())
    assert common >= 0.97 * total


def test_the_named_adapter_is_the_one_that_is_searched_with():
    model = adapted()
    model.add_adapter("other", SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    seen = []

    def loss(model, batch):
        seen.append(list(model.base_model.active_adapters))
        return model(**batch).loss

    search(model, adapter_name="other", loss_fn=loss)
    assert seen == [["other"]] * 4
    assert model.active_adapters == ["default"]
    both = adapted()
    search(both)
    assert tiny.same_state(positions(model, "other"), positions(both))


def test_a_loss_that_does_not_reach_the_backbone_is_no_ticket():
    def head_only(model, batch):
        inner = model.base_model.model
        with torch.no_grad():
            features = inner.backbone(batch["pixel_values"]).feature_maps
        return inner.decode_head(features).square().mean()

    failing("does not depend on the backbone", loss_fn=head_only)
    failing("a tensor of one element with a gradient", loss_fn=lambda m, b: 0.5)


def test_merged_disabled_and_empty_adapters_are_refused():
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        search(model)
    model = adapted()
    with model.disable_adapter(), pytest.raises(ValueError, match="disable_adapter"):
        search(model)
    empty = get_peft_model(tiny.swin(), SFAConfig(budget=0.1), low_cpu_mem_usage=True)
    with pytest.raises(ValueError, match="low_cpu_mem_usage"):
        search(empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_searched_in_float32(dtype):
    config = SFAConfig(
        budget=60, external_share=0.0, modules_to_save=["decode_head"], target_modules=["layernorm_after"]
    )
    model = get_peft_model(tiny.swin().to(dtype), config)
    before = {n: p.clone() for n, p in model.named_parameters() if "sfa_" not in n}
    half = [{"pixel_values": b["pixel_values"].to(dtype), "labels": b["labels"]} for b in BATCHES]

    def loss(model, batch):
        return nn.functional.cross_entropy(model(pixel_values=batch["pixel_values"]).logits.float(), batch["labels"])

    report = search(model, half, loss_fn=loss)
    # A weight of 1.0 cannot move by 5e-4 in bfloat16; its float32 copy can.
    assert any(share.chosen for share in report.shares if share.name.endswith("weight"))
    after = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if "sfa_" not in n}
    assert all(torch.equal(p, after[n.replace(".base_layer", "")]) for n, p in before.items())


def test_a_search_does_not_fix_the_precision_of_later_accelerators():
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        search(adapted())
        assert Accelerator(mixed_precision="bf16").mixed_precision == "bf16"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
