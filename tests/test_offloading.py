"""Models whose weights Accelerate keeps elsewhere compute what they compute otherwise."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from peft import PeftModel, get_peft_model

import tiny
from sfa_peft import SFAConfig, search_ticket, ticket_of

DEVICE = torch.device("cpu")


def adapted(make, **changes):
    config = SFAConfig(
        budget=0.1, init_weights=False, external_places=("attention", "mlp", "mlp_parallel", "block"), **changes
    )
    return get_peft_model(make(), config).eval()


def offloaded(kind, model, folder):
    if kind == "cpu_offload":
        return cpu_offload(model, DEVICE)
    if kind == "cpu_offload with buffers":
        return cpu_offload(model, DEVICE, offload_buffers=True)
    if kind == "disk_offload":
        return disk_offload(model, folder, DEVICE)
    first, *rest = [f"base_model.model.{name}" for name, _ in model.get_base_model().named_children()]
    places = {first: "disk"} | dict.fromkeys(rest, "cpu")
    return dispatch_model(model, places, main_device=DEVICE, offload_dir=folder, force_hooks=True)


KINDS = ["cpu_offload", "cpu_offload with buffers", "disk_offload", "dispatch_model"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2, tiny.swinv2])
def test_an_offloaded_model_computes_the_same(make, kind, tmp_path):
    model = adapted(make)
    expected = tiny.output(model)
    model = offloaded(kind, model, tmp_path)
    assert any(p.is_meta for p in model.parameters())
    assert torch.equal(tiny.output(model), expected)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model), tiny.output(make()))
    assert torch.equal(tiny.output(model), expected)


@pytest.mark.parametrize("make", [tiny.swin, tiny.dinov2])
def test_a_merged_model_can_be_offloaded(make, tmp_path):
    model = adapted(make).merge_and_unload()
    expected = tiny.output(model)
    assert torch.equal(tiny.output(cpu_offload(model, DEVICE)), expected)


def test_an_offloaded_model_is_merged_and_unmerged():
    model = cpu_offload(adapted(tiny.swin), DEVICE)
    expected = tiny.output(model)
    model.merge_adapter()
    assert torch.allclose(tiny.output(model), expected, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(tiny.output(model), expected)


def test_an_offloaded_model_saves_its_adapter(tmp_path):
    model = adapted(tiny.swin)
    expected = tiny.output(model)
    model = cpu_offload(model, DEVICE, offload_buffers=True)
    with pytest.raises(ValueError, match="no positions here"):
        ticket_of(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.output(PeftModel.from_pretrained(tiny.swin(), tmp_path)), expected)


def test_a_search_needs_all_weights():
    model = cpu_offload(get_peft_model(tiny.swin(), SFAConfig(budget=0.05)), DEVICE)
    with pytest.raises(ValueError, match="offloaded by Accelerate"):
        search_ticket(model, [tiny.batch()], steps=1)
