"""The loops that people train adapters with: Trainer, plain torch, Accelerate, several processes, compiled steps."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import Trainer, TrainerCallback, TrainingArguments

import needs
import tiny
from adapters import in_eval, train_on
from sfa_peft import CheckpointError, SFAConfig, install_ticket, search_ticket, ticket_of


def trained_parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


# Trainer


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return {key: value[0] for key, value in tiny.batch(1, seed=index).items()}


def trainer(model, folder, **options):
    arguments = {
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "save_steps": 3,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        model,
        TrainingArguments(output_dir=str(folder), **arguments | options),
        train_dataset=Scenes(),
        eval_dataset=Scenes(),
    )


def test_a_trainer_resumes_without_another_search(tmp_path):
    model = in_eval()
    search_ticket(model, [tiny.batch(seed=9)], steps=2, progress=False)
    trainer(model, tmp_path).train()
    expected = trained_parameters(model)
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()

    fresh = in_eval()  # with the data-free ticket
    trainer(fresh, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert tiny.same_state(trained_parameters(fresh), expected)


def test_a_trainer_loads_the_best_adapter_at_the_end(tmp_path):
    class Worse(TrainerCallback):
        """Makes what comes after the first checkpoint worse."""

        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(torch.randn_like(p).mul(10 * p.requires_grad))

    model = in_eval()
    own = trainer(model, tmp_path, eval_strategy="steps", eval_steps=3, load_best_model_at_end=True)
    own.add_callback(Worse())
    own.train()
    assert own.state.best_model_checkpoint.endswith("checkpoint-3")
    best = PeftModel.from_pretrained(tiny.swin(), own.state.best_model_checkpoint)
    assert torch.equal(tiny.output(model), tiny.output(best))


# Optimizers and averages


@pytest.mark.parametrize("kind", ["fused", "foreach"])
def test_fused_and_foreach_optimizers_train_the_same(kind):
    batches = [tiny.batch(seed=step) for step in range(3)]
    plain, other = in_eval(), in_eval()
    train_on(plain, batches, foreach=False)
    train_on(other, batches, **{kind: True})
    expected = trained_parameters(plain)
    for name, p in trained_parameters(other).items():
        torch.testing.assert_close(p, expected[name], msg=name)


def test_gradient_accumulation_is_a_larger_batch():
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    whole, model = in_eval(), in_eval()
    batch = tiny.batch(4)
    train_on(whole, [batch])
    model, optimizer = accelerator.prepare(
        model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    )
    for half in (batch["pixel_values"][:2], batch["pixel_values"][2:]):
        with accelerator.accumulate(model):
            accelerator.backward(model(half).logits.square().mean())
            optimizer.step()
            optimizer.zero_grad()
    expected = trained_parameters(whole)
    for name, p in trained_parameters(model).items():
        torch.testing.assert_close(p, expected[name], msg=name)


def test_an_average_of_adapters_can_be_saved(tmp_path):
    model = in_eval()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    before = trained_parameters(model)
    average.update_parameters(model)  # the first is a copy
    train_on(model, [tiny.batch()])
    average.update_parameters(model)
    after = trained_parameters(model)
    for name, p in trained_parameters(average.module).items():
        torch.testing.assert_close(p, (before[name] + after[name]) / 2, msg=name)
    average.module.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path)
    assert torch.equal(tiny.output(loaded), tiny.output(average.module))


# Compiled


@needs.torch_since("2.11", "torch compiles no whole forward pass of a PeftModel: its context manager breaks the graph")
@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_a_compiled_step_is_compiled_once(make, tmp_path):
    """No graph break in it, and no recompilation when values change: by an optimizer, by loading, by swapping."""
    torch.compiler.reset()
    model = get_peft_model(make(), SFAConfig(budget=0.1, external_places=["attention", "mlp_parallel"]))
    model.save_pretrained(tmp_path)
    step = torch.compile(lambda x: model(x).logits.square().mean(), fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(step(tiny.pixels()))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        torch.compiler.set_stance("fail_on_recompile")
    try:
        assert len({loss.item() for loss in losses}) == 3
        torch.testing.assert_close(step(tiny.pixels()), model(tiny.pixels()).logits.square().mean())
        model.load_adapter(tmp_path, "default", is_trainable=True)
        torch.testing.assert_close(step(tiny.pixels()), losses[0])
    finally:
        torch.compiler.set_stance("default")


# A whole state in a new process, which has searched for nothing


def searched(**options):
    model = in_eval(**options)
    search_ticket(model, [tiny.batch(seed=9)], steps=2, progress=False)
    return model


BATCHES = [tiny.batch(seed=seed) for seed in range(3)]


@pytest.mark.parametrize("options", [{}, {"external_placement": "auto"}], ids=["ticket", "ticket and placement"])
def test_a_state_brings_its_ticket_along(options):
    model = searched(**options)
    train_on(model, BATCHES)
    again = in_eval(**options)
    again.load_state_dict(model.state_dict())
    assert torch.equal(tiny.output(again), tiny.output(model))
    config, other = again.peft_config["default"], model.peft_config["default"]
    assert (config.ticket_sizes, config.external_widths) == (other.ticket_sizes, other.external_widths)


def test_accelerate_goes_on_in_a_new_process(tmp_path):
    def made(model):
        accelerator = Accelerator(cpu=True)
        return accelerator, *accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))

    def steps(model, optimizer, batches):
        for batch in batches:
            model(batch["pixel_values"]).logits.square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    accelerator, model, optimizer = made(searched())
    ticket = ticket_of(model)
    steps(model, optimizer, BATCHES)
    accelerator.save_state(tmp_path / "state")
    steps(model, optimizer, BATCHES)
    expected = trained_parameters(model)

    accelerator, again, _ = made(in_eval())
    before = trained_parameters(again)
    with pytest.raises(CheckpointError, match=r"another ticket.*an optimizer trains it already.*install_ticket"):
        accelerator.load_state(tmp_path / "state")
    assert all(torch.equal(p, before[name]) for name, p in trained_parameters(again).items())

    fresh = in_eval()
    install_ticket(fresh, ticket)
    accelerator, again, optimizer = made(fresh)
    accelerator.load_state(tmp_path / "state")
    steps(again, optimizer, BATCHES)
    assert all(torch.equal(p, expected[name]) for name, p in trained_parameters(again).items())


def test_a_state_does_not_replace_what_was_learned():
    model, trained = searched(), in_eval()
    train_on(trained, BATCHES)
    before = trained_parameters(trained)
    with pytest.raises(CheckpointError, match="it has been trained"):
        trained.load_state_dict(model.state_dict())
    assert all(torch.equal(p, before[name]) for name, p in trained_parameters(trained).items())


def test_a_state_with_impossible_positions_is_refused():
    state = searched().state_dict()
    key = next(key for key in state if key.endswith("fc1.sfa_internal.default.weight_positions"))
    for damaged in (state[key].flip(0), state[key] + 1_000_000):
        again = in_eval()
        before = ticket_of(again)
        with pytest.raises(CheckpointError, match="sorted and among"):
            again.load_state_dict(state | {key: damaged})
        assert ticket_of(again).overlap(before) == 1


# An optimizer made too early


def search_again(model):
    search_ticket(model, [tiny.batch(seed=9)], steps=2, progress=False)


def install_again(model):
    install_ticket(model, ticket_of(searched()))


@pytest.mark.parametrize("replace", [search_again, install_again])
def test_an_optimizer_that_is_left_behind_is_told(replace):
    model = in_eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.warns(
        UserWarning, match=r"an optimizer \(SGD\) was created before adapter 'default' got another ticket"
    ):
        replace(model)
    assert optimizer


@pytest.mark.parametrize("replace", [search_again, install_again])
def test_an_optimizer_of_other_parameters_is_not_told(replace):
    model = in_eval()
    gone = torch.optim.SGD(model.parameters(), lr=0.1)
    del gone
    of_others = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an optimizer")
        replace(model)
    assert of_others


# Several processes


@pytest.mark.slow
@pytest.mark.parametrize(
    "way", ["ddp", pytest.param("fsdp", marks=needs.torch_since("2.9", "fully_shard does not run on CPUs"))]
)
def test_two_processes_train_what_one_trains(way, tmp_path):
    script = Path(__file__).with_name("distributed_training.py")  # it checks what is sent, too
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script), way, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    alone = in_eval()
    train_on(alone, [tiny.batch(4, seed=step) for step in range(3)])
    expected, found = get_peft_model_state_dict(alone), torch.load(tmp_path / "state.pt")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4, msg=name)
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path / "adapter")
    torch.testing.assert_close(tiny.output(loaded), tiny.output(alone), atol=1e-5, rtol=1e-4)
