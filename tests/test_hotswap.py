"""`peft.utils.hotswap.hotswap_adapter`."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter

import needs
import tiny
from sfa_peft import SFAConfig


def saved(folder, seed=0, **options):
    torch.manual_seed(seed)
    options = {"budget": 0.1, "modules_to_save": ["decode_head"]} | options
    model = tiny.train(get_peft_model(tiny.swin(), SFAConfig(**options)))
    model.save_pretrained(folder)
    return tiny.output(model)


@pytest.mark.parametrize("second", [{}, {"initial_ticket": "random"}])
def test_another_adapter_takes_the_place_of_one(tmp_path, second):
    first = saved(tmp_path / "a")
    other = saved(tmp_path / "b", seed=1, **second)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a")
    pieces = {n: p.data_ptr() for n, p in model.named_parameters()}
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default")
    assert torch.equal(tiny.output(model), other)
    if not second:  # the same tensors with other values
        assert pieces == {n: p.data_ptr() for n, p in model.named_parameters()}
    hotswap_adapter(model, str(tmp_path / "a"), adapter_name="default")
    assert torch.equal(tiny.output(model), first)


@needs.torch_since("2.7", "torch.compile fails in transformers' Swin")
@pytest.mark.slow
def test_a_compiled_model_goes_on_without_compiling_anew(tmp_path):
    saved(tmp_path / "a")
    other = saved(tmp_path / "b", seed=1)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a").eval()
    compiled = torch.compile(model, backend="aot_eager")
    tiny.output(compiled)
    counter = torch._dynamo.utils.counters
    before = counter["stats"]["unique_graphs"]
    hotswap_adapter(compiled, str(tmp_path / "b"), adapter_name="default")
    torch.testing.assert_close(tiny.output(compiled), other)
    assert counter["stats"]["unique_graphs"] == before


@pytest.mark.parametrize(
    ("match", "second"),
    [
        ("external_activation", {"external_activation": "relu"}),
        ("internal_granularity", {"internal_granularity": "row"}),
        ("external_widths", {"external_places": ["mlp"]}),
    ],
)
def test_an_adapter_of_another_kind_is_refused_and_changes_nothing(tmp_path, match, second):
    first = saved(tmp_path / "a")
    saved(tmp_path / "b", seed=1, **second)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a")
    with pytest.raises(ValueError, match=match):
        hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default")
    assert torch.equal(tiny.output(model), first)


def test_a_damaged_file_changes_nothing(tmp_path):
    first = saved(tmp_path / "a")
    saved(tmp_path / "b", seed=1, initial_ticket="random")
    path = tmp_path / "b" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-8] ^= 1
    path.write_bytes(data)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a")
    with pytest.raises(ValueError, match="adapter_model"):
        hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default")
    assert torch.equal(tiny.output(model), first)


def test_a_merged_adapter_is_not_swapped(tmp_path):
    saved(tmp_path / "a")
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        hotswap_adapter(model, str(tmp_path / "a"), adapter_name="default")


def test_lora_is_swapped_as_ever(tmp_path):
    for seed, name in enumerate(("a", "b")):
        torch.manual_seed(seed)
        model = get_peft_model(tiny.swin(), LoraConfig(target_modules=["fc1"], init_lora_weights=False))
        model.save_pretrained(tmp_path / name)
    expected = tiny.output(PeftModel.from_pretrained(tiny.swin(), tmp_path / "b"))
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a")
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="default")
    assert torch.equal(tiny.output(model), expected)


def test_an_adapter_that_is_not_active_is_compared_with_itself(tmp_path):
    saved(tmp_path / "a", budget=1000)
    other = saved(tmp_path / "b", seed=1, budget=1000)
    saved(tmp_path / "c", budget=1000, external_scale=4.0)
    saved(tmp_path / "d", budget=1000, modules_to_save=None)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "a", adapter_name="a")
    model.load_adapter(tmp_path / "c", "c")
    model.set_adapter("c")
    before = tiny.state(model)
    for folder, field in (("c", "external_scale"), ("d", "modules_to_save")):
        with pytest.raises(ValueError, match=field):
            hotswap_adapter(model, str(tmp_path / folder), adapter_name="a")
    assert tiny.same_state(tiny.state(model), before)
    hotswap_adapter(model, str(tmp_path / "b"), adapter_name="a")
    model.set_adapter("a")
    assert torch.equal(tiny.output(model), other)


def test_what_is_swapped_in_is_in_the_models_mode(tmp_path):
    for seed, ticket in enumerate(("magnitude", "random")):
        saved(tmp_path / ticket, seed=seed, initial_ticket=ticket, external_dropout=0.5)
    model = PeftModel.from_pretrained(tiny.swin(), tmp_path / "magnitude")
    hotswap_adapter(model, str(tmp_path / "random"), adapter_name="default")
    assert not any(module.training for module in model.modules())
