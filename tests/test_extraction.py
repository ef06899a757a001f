"""Adapters that are made out of a base model and a fine-tuned one."""

import copy

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tiny
from adapters import positions
from sfa_peft import SFAConfig, extract_adapter


def finetuned(base, density=0.02, seed=0):
    """A copy of a model with some of the weights of its linear layers and norms changed."""
    model = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.LayerNorm):
                for p in module.parameters():
                    moved = torch.rand(p.shape, generator=generator) < density
                    p += (moved * torch.randn(p.shape, generator=generator) * 0.1).to(p)
    return model


def changed(base, other):
    return sum(int((a != b).sum()) for a, b in zip(base.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2, tiny.dinov3, tiny.dpt_on_dinov2])
def test_a_sparse_fine_tuning_becomes_an_exact_adapter(make, tmp_path):
    base = make()
    goal = finetuned(base)
    count = changed(base, goal)
    model, extraction = extract_adapter(base, goal)
    assert (extraction.size, extraction.changed, extraction.left_out) == (count, count, {})
    assert extraction.relative_error < 1e-6
    assert sum(len(p) for p in positions(model).values()) == count
    expected = tiny.output(goal)
    assert torch.allclose(tiny.output(model), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.allclose(tiny.output(loaded), expected, rtol=1e-5, atol=1e-6)
    merged = loaded.merge_and_unload()
    for name, tensor in goal.state_dict().items():
        assert torch.allclose(merged.state_dict()[name], tensor, rtol=1e-6, atol=1e-8), name


def test_weights_that_move_a_little_are_met_bit_for_bit():
    base = tiny.vit()
    goal = copy.deepcopy(base)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in goal.layers:
            layer.mlp.fc1.weight *= 1 + 0.3 * (torch.rand(layer.mlp.fc1.weight.shape, generator=generator) < 0.1)
    model, extraction = extract_adapter(base, goal)
    assert extraction.relative_error == 0
    assert tiny.same_state(model.merge_and_unload().state_dict(), goal.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact(dtype):
    base = tiny.vit().to(dtype)
    goal = finetuned(base)
    model, extraction = extract_adapter(base, goal)
    assert extraction.relative_error == 0
    assert tiny.same_state(model.merge_and_unload().state_dict(), goal.state_dict())


@pytest.mark.parametrize("budget", [100, 0.05])
def test_of_a_dense_fine_tuning_the_largest_differences_are_taken(budget):
    base = tiny.vit()
    goal = finetuned(base, density=1.0)
    weights = {n: p.detach().clone() for n, p in base.named_parameters()}
    size = budget if isinstance(budget, int) else int(budget * sum(p.numel() for p in base.parameters()))
    model, extraction = extract_adapter(base, goal, budget)
    assert extraction.size == size
    differences = torch.cat([(p - weights[n]).flatten() for n, p in goal.named_parameters()]).abs().detach()
    ordered = differences.sort(descending=True).values
    assert extraction.changed == int((differences > 0).sum())
    assert extraction.relative_error == pytest.approx(float(ordered[size:].norm() / ordered.norm()), rel=1e-4)
    smallest = min(
        float((goal.get_parameter(name).detach() - weights[name]).flatten()[at.long()].abs().min())
        for name, at in positions(model.base_model.model).items()
    )
    assert smallest == pytest.approx(float(ordered[size - 1]))
    assert f"{size:,} of {extraction.changed:,} changed weights" in str(extraction)


def test_a_budget_that_is_not_needed_is_not_used():
    base = tiny.vit()
    goal = finetuned(base)
    count = changed(base, goal)
    model, extraction = extract_adapter(base, goal, 0.5)
    assert extraction.size == count
    assert model.peft_config["default"].budget == count


def test_heads_are_taken_over_whole(tmp_path):
    base, goal = tiny.swin(), finetuned(tiny.swin())
    with torch.no_grad():
        for p in goal.decode_head.parameters():
            p += 0.1
        goal.decode_head.bottleneck.batch_norm.running_mean += 0.1
    with pytest.raises(ValueError, match=r"'decode_head\..*Name heads in `modules_to_save`"):
        extract_adapter(base, goal)
    model, extraction = extract_adapter(base, goal, modules_to_save=["decode_head"], adapter_name="extracted")
    assert not any(name.startswith("decode_head") for name in positions(model, "extracted"))
    assert extraction.left_out == {}
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.swin(), tmp_path / "extracted")
    assert torch.allclose(tiny.output(loaded), tiny.output(goal), rtol=1e-5, atol=1e-6)


def test_the_error_counts_what_an_adapter_cannot_change():
    base = tiny.vit()
    goal = finetuned(base)
    pairs = zip(base.parameters(), goal.parameters(), strict=True)
    inside = sum(float((a - b).detach().square().sum()) for a, b in pairs)
    with torch.no_grad():
        goal.embeddings.cls_token += 0.1
    with pytest.raises(ValueError, match=r"also differ in 'embeddings\.cls_token'"):
        extract_adapter(base, goal)
    _, extraction = extract_adapter(base, goal, 0.5)
    outside = 16 * 0.01
    assert list(extraction.left_out) == ["embeddings.cls_token"]
    assert extraction.relative_error == pytest.approx((outside / (inside + outside)) ** 0.5, rel=1e-4)
    assert "not adapted: 'embeddings.cls_token'" in str(extraction)


def test_only_targets_are_changed():
    base = tiny.vit()
    goal = finetuned(base)
    with pytest.raises(ValueError, match="also differ in"):
        extract_adapter(base, goal, target_modules=["mlp.fc1"])
    model, _ = extract_adapter(base, goal, 0.5, target_modules=["mlp.fc1"])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in positions(model)} == {"fc1"}


def test_an_extracted_adapter_can_be_trained_on():
    base = tiny.swin()
    model, extraction = extract_adapter(base, finetuned(base))
    before = tiny.output(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == extraction.size
    tiny.train(model)
    assert not torch.equal(tiny.output(model), before)


def shared():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    return model


@pytest.mark.parametrize(
    ("base", "goal", "options", "message"),
    [
        (tiny.vit(), tiny.vit(), {}, "do not differ"),
        (tiny.vit(), tiny.dinov3(), {}, "have different tensors: .* is missing in the fine-tuned model"),
        (tiny.swin(), tiny.swin(seed=1), {}, "which is no sparse change; give a `budget`|also differ"),
        (tiny.swin(), tiny.upernet(tiny.swin_config(), num_labels=5), {}, "'decode_head.classifier.weight' has shape"),
        (tiny.vit(), finetuned(tiny.vit()), {"budget": -3}, "budget"),
        (shared(), finetuned(shared()), {}, r"also differ in '[01]\.weight'"),
    ],
    ids=["same", "class", "dense", "labels", "budget", "shared"],
)
def test_what_cannot_be_extracted_is_refused_and_changes_nothing(base, goal, options, message):
    before = tiny.state(base)
    with pytest.raises(ValueError, match=message):
        extract_adapter(base, goal, **options)
    assert tiny.same_state(tiny.state(base), before)


def test_an_interrupt_leaves_the_base_as_it_was(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    base = tiny.swin()
    before = tiny.state(base)
    monkeypatch.setattr("sfa_peft.search.extraction._fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        extract_adapter(base, finetuned(base), modules_to_save=["decode_head"])
    assert tiny.same_state(tiny.state(base), before)
    assert not hasattr(base, "peft_config")


def test_an_adapter_is_extracted_as_it_was():
    model = get_peft_model(tiny.swin(), SFAConfig(internal_density=0.02, external_modules=[], init_weights=False))
    expected, ticket = tiny.output(model), positions(model)
    again, extraction = extract_adapter(tiny.swin(), copy.deepcopy(model).merge_and_unload())
    assert torch.allclose(tiny.output(again), expected, rtol=1e-5, atol=1e-6)
    assert extraction.size == sum(len(p) for p in ticket.values())
    assert all(torch.equal(p, ticket[name]) for name, p in positions(again).items())
