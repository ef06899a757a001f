"""Every version reads what earlier ones wrote."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model

import tiny
from sfa_peft import BaseMismatchWarning, CheckpointError, SFAConfig, Ticket

ADAPTERS = sorted(p.parent for p in Path(__file__).with_name("golden").glob("*/*/expected.json"))
TICKETS = sorted(Path(__file__).with_name("golden").glob("*/ticket.safetensors"))


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_golden_adapter_is_read(folder):
    expected = json.loads((folder / "expected.json").read_text())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        # The base may be initialised in another way one day.
        warnings.filterwarnings("ignore", "(?s).*have other values", BaseMismatchWarning)
        state = PeftModel.from_pretrained(tiny.swin(), folder).state_dict()
    adapter = {key: t for key, t in state.items() if ".sfa_" in key or ".modules_to_save." in key}
    assert adapter.keys() == expected.keys()
    for key, tensor in adapter.items():
        if "positions" in expected[key]:
            assert tensor.tolist() == expected[key]["positions"]
        else:
            # Saved in half precision, some of them.
            assert torch.allclose(tensor.float().flatten(), torch.tensor(expected[key]["values"]), rtol=2**-8)


def test_there_are_golden_adapters_of_every_kind():
    assert {f.name for f in ADAPTERS} == {"elements", "rows", "columns", "external", "dense", "head"}


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda f: f.name)
def test_a_golden_config_alone_is_read(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, SFAConfig)
    assert "internal_block_size" not in config.to_dict()


@pytest.mark.parametrize(
    "load",
    [
        SFAConfig.from_pretrained,
        lambda folder: PeftModel.from_pretrained(tiny.swin(), folder),
        lambda folder: get_peft_model(tiny.swin(), SFAConfig()).load_adapter(folder, "other"),
        lambda folder: tiny.swin().load_adapter(str(folder)),
    ],
    ids=["config", "from_pretrained", "load_adapter", "transformers"],
)
def test_blocks_are_refused(load):
    with pytest.raises(CheckpointError, match=r"block granularity was removed in 0\.2; sfa_peft 0\.1 reads"):
        load(Path(__file__).with_name("golden") / "v1" / "blocks")


def test_a_share_that_a_search_has_found_is_read(tmp_path):
    elements = Path(__file__).with_name("golden") / "v1" / "elements"
    shutil.copytree(elements, tmp_path, dirs_exist_ok=True)
    config = json.loads((elements / "adapter_config.json").read_text())
    changed = config | {"external_share": "auto", "external_placement": "auto"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(changed))
    one, other = (PeftModel.from_pretrained(tiny.swin(), folder) for folder in (elements, tmp_path))
    assert tiny.same_state(one.state_dict(), other.state_dict())
    assert other.peft_config["default"].external_share == 0.5


@pytest.mark.parametrize("path", TICKETS, ids=lambda p: p.parent.name)
def test_a_golden_ticket_is_read(path):
    ticket = Ticket.load(path)
    found = {name: own.tolist() for name, own in ticket.by_name().items()}
    assert found == json.loads(path.with_suffix(".json").read_text())
