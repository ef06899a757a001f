"""Every version reads what earlier ones wrote."""

import json
import warnings
from pathlib import Path

import pytest
import torch
from peft import PeftModel

import tiny
from sfa_peft import BaseMismatchWarning, Ticket

ADAPTERS = sorted(p.parent for p in Path(__file__).with_name("golden").glob("*/*/adapter_config.json"))
TICKETS = sorted(Path(__file__).with_name("golden").glob("*/ticket.safetensors"))


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda f: f"{f.parent.name}-{f.name}")
def test_a_golden_adapter_is_read(folder):
    expected = json.loads((folder / "expected.json").read_text())
    with warnings.catch_warnings():
        # The base may be initialised in another way one day.
        warnings.simplefilter("error", BaseMismatchWarning)
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
    assert {f.name for f in ADAPTERS} == {"elements", "rows", "columns", "blocks", "external", "dense", "head"}


@pytest.mark.parametrize("path", TICKETS, ids=lambda p: p.parent.name)
def test_a_golden_ticket_is_read(path):
    ticket = Ticket.load(path)
    found = {name: own.tolist() for name, own in ticket.by_name().items()}
    assert found == json.loads(path.with_suffix(".json").read_text())
