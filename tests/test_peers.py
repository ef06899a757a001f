"""The methods that benchmarks/accuracy.py compares, on tiny backbones: each trains what it says, within its budget."""

import io
import itertools
import zipfile
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Backbone, SwinBackbone

import tiny
from accuracy import (
    METHODS,
    MOST_RATES,
    WITHOUT_BUDGET,
    Bench,
    Segmenter,
    default_run,
    loss_of,
    tuned,
    with_first_phase,
)

from dense.methods import Dense, trained_backbone_parameters

HEADS = ["decode_head"]
BUDGET = 0.3  # in less there is no room for the smallest DoRA and Mona


@pytest.fixture(params=["swin", "dinov2"])
def segmenter(request, tmp_path):
    if request.param == "swin":
        backbone = SwinBackbone(tiny.swin_config(embed_dim=16))
    else:
        backbone = Dinov2Backbone(tiny.dinov2_config())
    backbone.save_pretrained(tmp_path)
    model = Segmenter(str(tmp_path))
    model.set_head("linear", 3)
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_method_begins_as_the_base_and_trains_within_its_budget(segmenter, method):
    images = tiny.pixels()
    before = segmenter.eval()(images)
    of_the_base = {id(p) for p in segmenter.parameters()}
    dense = Dense(segmenter, "backbone", HEADS)
    budget = int(BUDGET * dense.backbone_parameters)
    model = METHODS[method](dense, budget, default_run(method, BUDGET))
    torch.testing.assert_close(model.eval()(images), before, rtol=0, atol=1e-5)

    trained = trained_backbone_parameters(model, dense.heads)
    if method not in WITHOUT_BUDGET:
        assert 0 < trained <= budget
    loss_of(model.train(), (images, torch.zeros(2, *images.shape[2:], dtype=torch.long))).backward()
    added = {n: p for n, p in model.named_parameters() if p.requires_grad and id(p) not in of_the_base}
    assert [name for name, p in added.items() if p.grad is None] == []


def test_an_upernet_head(segmenter):
    segmenter.set_head("upernet", 3)
    images = tiny.pixels()
    assert segmenter(images).shape == (len(images), 3, *images.shape[2:])


@pytest.mark.parametrize(
    ("best", "rates"),
    [
        (1e-2, [0.005, 0.01, 0.02]),
        (4e-2, [0.005, 0.01, 0.02, 0.04, 0.08]),
        (1e-3, [0.000625, 0.00125, 0.0025, 0.005, 0.01, 0.02]),
        (1.0, [0.005, 0.01, 0.02, 0.04, 0.08, 0.16]),  # no longer than that
    ],
)
def test_a_rate_is_searched_until_the_best_is_inside(best, rates):
    known = {}
    for _ in range(MOST_RATES):  # what comes next is asked again after each round, as results arrive
        wanted = list(tuned(default_run("LoRA", 0.02), [3, 4, 5], lambda run, seed: known.get((run.rate, seed))))
        known.update({(run.rate, seed): -abs(run.rate - best) for run, seed in wanted})
    assert sorted(rate for rate, seed in known if seed == 3) == rates
    chosen = min(rates, key=lambda rate: abs(rate - best))
    assert sorted(seed for rate, seed in known if rate == chosen) == [3, 4, 5]
    assert len(known) == len(rates) + 2


@pytest.fixture
def bench(tmp_path):
    SwinBackbone(tiny.swin_config(embed_dim=16)).save_pretrained(tmp_path / "swin")
    noise = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "scenes.zip", "w") as file:
        for split, i in itertools.product(("train", "validation"), range(8)):
            for column, values in (("image", noise.integers(256, size=(32, 32, 3))), ("label", np.eye(32))):
                data = io.BytesIO()
                Image.fromarray(values.astype(np.uint8)).save(data, "PNG")
                file.writestr(f"{split}/{i:05}.{column}", data.getvalue())
    sizes = {"image_size": (32, 32), "eval_size": (32, 32), "classes": 2}
    args = Namespace(data=tmp_path / "scenes.zip", device="cpu", steps=4, **sizes)
    return Bench(args, str(tmp_path / "swin"))


@pytest.mark.parametrize("method", ["both", "LoRA", "full"])
def test_all_runs_have_as_many_steps_also_with_a_first_phase(bench, method, monkeypatch):
    trained = []
    batches = bench.batches
    monkeypatch.setattr(bench, "batches", lambda seed, steps: trained.append(steps) or batches(seed, steps))
    for run in with_first_phase(default_run(method, BUDGET)):
        run = replace(run, search_steps=min(run.search_steps, 1), first_steps=min(run.first_steps, 1))
        trained.clear()
        result = bench.run(run, 0)
        assert sum(trained) == 4
        assert len(trained) == 1 + run.search_steps + run.first_steps
        assert 0 < result["trained"] <= (1 if method == "full" else BUDGET) * result["backbone"]
