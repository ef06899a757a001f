"""Detectors whose embeddings PEFT cannot ask for, and whose heads are tied to their decoders."""

import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model

import tiny
from sfa_peft import SFAConfig, search_ticket

IDS = torch.tensor([[101, 5, 6, 102]]).clamp(max=199).expand(2, -1)
INPUTS = {
    "deformable_detr": {"pixel_values": tiny.pixels(size=64)},
    "grounding_dino": {"pixel_values": tiny.pixels(size=64), "input_ids": IDS},
}


@pytest.fixture(params=INPUTS)
def name(request):
    return request.param


def features(model, inputs):
    """What all predictions are made from."""
    return model(**inputs).last_hidden_state


@torch.no_grad()
def predicted(model, name):
    return features(model.eval(), INPUTS[name])


def test_a_detector_is_searched_trained_saved_loaded_and_merged(name, tmp_path):
    make, inputs = getattr(tiny, name), INPUTS[name]
    model = get_peft_model(make(), SFAConfig(budget=0.05))
    search_ticket(
        model, [inputs], steps=2, loss_fn=lambda model, inputs: features(model, inputs).square().mean(), progress=False
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(3):
        features(model.train(), inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    base, trained = predicted(make(), name), predicted(model, name)
    assert not torch.allclose(base, trained)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make(), tmp_path)
    assert torch.equal(predicted(loaded, name), trained)
    assert torch.allclose(predicted(loaded.merge_and_unload(), name), trained, atol=1e-5)


def test_a_head_that_is_tied_is_told(name):
    with pytest.warns(UserWarning, match=r"'bbox_embed.0', which is tied to .*'model.decoder.bbox_embed.0'"):
        get_peft_model(getattr(tiny, name)(), SFAConfig(budget=0.05, modules_to_save=["bbox_embed.0"]))


def test_a_head_that_is_not_tied_is_not_told():
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*is tied to")
        get_peft_model(tiny.rf_detr(), SFAConfig(budget=0.05, modules_to_save=["bbox_embed", "class_embed"]))
        get_peft_model(tiny.swin(), SFAConfig(budget=0.05, modules_to_save=["decode_head"]))
