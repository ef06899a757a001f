"""The notebook runs from top to bottom, and is stored without what a run puts into it."""

import json
from functools import partial

import pytest
import torch

import pages
import tiny

from dense import nano_backbone

PATH = pages.ROOT / "examples" / "segmentation.ipynb"
# Instead of the numbers of the first cell.
SETTINGS = {"SCENES": 10, "SEARCH_STEPS": 1, "STEPS": 2, "BATCH": 2}


@pytest.fixture(scope="module")
def notebook():
    return json.loads(PATH.read_text())


def test_it_has_no_outputs(notebook):
    cells = notebook["cells"]
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in cells}) == len(cells)
    for cell in cells:
        is_code = cell["cell_type"] == "code"
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | (
            {"execution_count", "outputs"} if is_code else set()
        )
        assert cell["metadata"] == {}
        if is_code:
            assert (cell["execution_count"], cell["outputs"]) == (None, [])
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}


@pytest.mark.slow
def test_it_runs(notebook, tmp_path, monkeypatch, capsys, pictures):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MPLBACKEND", "agg")
    pretrain = partial(nano_backbone.pretrained_nano_backbone, scenes=4, steps=2)
    monkeypatch.setattr(nano_backbone, "pretrained_nano_backbone", pretrain)
    settings, *cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    names = {}
    exec(settings, names)
    assert SETTINGS.keys() == names.keys() - {"__builtins__"}
    names |= SETTINGS
    for number, cell in enumerate(cells, 2):
        exec(compile(cell, f"cell {number} of the code", "exec"), names)
    assert (tmp_path / "out" / "notebook" / "ticket.png").stat().st_size > 1000
    model = names["model"]
    assert list(model.peft_config) == ["day", "dusk"]
    x = tiny.pixels(size=96)
    outputs = []
    for adapter in ("day", "dusk"):
        model.set_adapter(adapter)
        outputs.append(tiny.output(model, x))
    assert not torch.equal(*outputs)
    torch.testing.assert_close(tiny.output(names["loaded"], x), outputs[0])  # with another attention
