"""The methods that benchmarks/accuracy.py compares, on tiny backbones: each trains what it says, within its budget."""

import pytest
import torch
from transformers import Dinov2Backbone, SwinBackbone

import tiny
from accuracy import METHODS, WITHOUT_BUDGET, Segmenter, default_run, loss_of

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
    return Segmenter(str(tmp_path), classes=3)


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
