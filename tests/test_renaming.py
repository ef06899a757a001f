"""Loading an adapter into a model in which the adapted modules have other names."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

import tiny
from sfa_peft import BaseMismatchWarning, CheckpointError, SFAConfig


class Net(nn.Module):
    """A few linear layers under names of one's choice."""

    def __init__(self, *names):
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            self.add_module(name, nn.Linear(6, 6))
        self.names = names

    def forward(self, x):
        for name in self.names:
            x = torch.tanh(getattr(self, name)(x))
        return x


class Around(nn.Module):
    """A segmentation model whose backbone and head have other names."""

    def __init__(self, model):
        super().__init__()
        self.trunk, self.tasks = model.backbone, nn.ModuleDict({"day": model.decode_head})
        self.size = (tiny.SIZE, tiny.SIZE)

    def forward(self, x):
        logits = self.tasks["day"](self.trunk(x).feature_maps)
        return {"logits": nn.functional.interpolate(logits, size=self.size, mode="bilinear", align_corners=False)}


MAPPING = {r"^backbone\.": "trunk.", r"^decode_head": "tasks.day"}


def changed(model, seed=1):
    """Give every adapter values, so that it does something."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".sfa_" in name:
                p.add_(0.1 * torch.randn_like(p))
    return model.eval()


def test_names_that_sort_in_another_way_get_their_own_values(tmp_path):
    config = SFAConfig(target_modules=["a", "b", "c"], external_modules=["b"], external_width=2, internal_density=0.3)
    model = changed(get_peft_model(Net("a", "b", "c"), config))
    model.save_pretrained(tmp_path)
    x = torch.randn(4, 6)
    mapping = {"^a": "z", "^c": "a"}
    loaded = PeftModel.from_pretrained(Net("z", "b", "a"), tmp_path, key_mapping=mapping)
    assert torch.equal(loaded(x), model(x))
    assert set(loaded.peft_config["default"].ticket_sizes) <= {f"{m}.{p}" for m in "zba" for p in ("weight", "bias")}


def test_heads_externals_and_tickets_are_found_under_other_names(tmp_path):
    model = tiny.train(
        get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["decode_head"], external_places=["mlp"]))
    )
    model.save_pretrained(tmp_path)
    expected = tiny.output(model)
    loaded = PeftModel.from_pretrained(Around(tiny.swin()), tmp_path, "first", key_mapping=MAPPING)
    assert torch.equal(tiny.output(loaded), expected)
    loaded.load_adapter(tmp_path, "second", key_mapping=MAPPING)
    loaded.set_adapter("second")
    assert torch.equal(tiny.output(loaded), expected)
    config = loaded.peft_config["second"]
    assert config.modules_to_save == ["tasks.day"]
    assert config.base_fingerprint["roots"] == ["trunk"]

    loaded.save_pretrained(tmp_path / "again", selected_adapters=["second"])
    again = PeftModel.from_pretrained(Around(tiny.swin()), tmp_path / "again" / "second")
    assert torch.equal(tiny.output(again), expected)


def test_heads_that_are_named_by_their_ending_are_found(tmp_path):
    model = get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["batch_norm", "classifier"]))
    tiny.train(model).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(Around(tiny.swin()), tmp_path, key_mapping=MAPPING)
    assert torch.equal(tiny.output(loaded), tiny.output(model))
    assert all(name.startswith("tasks.day.") for name in loaded.peft_config["default"].modules_to_save)


def test_another_base_is_told_under_other_names_as_well(tmp_path):
    get_peft_model(tiny.swin(), SFAConfig(budget=0.1)).save_pretrained(tmp_path)
    with pytest.warns(BaseMismatchWarning, match="other values"):
        PeftModel.from_pretrained(Around(tiny.swin(seed=5)), tmp_path, key_mapping=MAPPING)


def test_two_modules_cannot_get_one_name(tmp_path):
    config = SFAConfig(target_modules=["a", "b"], external_modules=[], internal_density=0.5)
    get_peft_model(Net("a", "b"), config).save_pretrained(tmp_path)
    base = Net("c", "d")
    before = tiny.state(base)
    with pytest.raises(CheckpointError, match=r"key_mapping=.*gives the name 'c.(weight|bias)' to two modules"):
        PeftModel.from_pretrained(base, tmp_path, key_mapping={"^[ab]": "c"})
    assert tiny.same_state(tiny.state(base), before)
    assert not hasattr(base, "peft_config")


def test_a_mapping_that_matches_nothing_says_what_is_missing(tmp_path):
    get_peft_model(tiny.swin(), SFAConfig(budget=0.1)).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="does not have in that form"):
        PeftModel.from_pretrained(Around(tiny.swin()), tmp_path, key_mapping={"^spine": "trunk"})
