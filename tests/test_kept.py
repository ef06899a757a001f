"""Changed parameters that are kept between forward passes give what those computed in each pass give."""

import copy
import pickle
import threading

import pytest
import torch
from peft import get_peft_model
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import tiny
from sfa_peft import SFAConfig, ticket_of

AUTOCAST = torch.autocast("cpu", torch.bfloat16)


def adapted(granularity="element", keep=None, make=tiny.dinov2, share=0.5, **options):
    torch.manual_seed(0)
    config = SFAConfig(
        budget=0.1,
        external_share=share,
        internal_granularity=granularity,
        initial_ticket="random",
        init_weights=False,
        keep_weights=keep,
        **options,
    )
    return get_peft_model(make(), config).eval()


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def kept(model):
    """How many layers keep their changed parameters."""
    return sum(entry.buffer is not None for entry in model.base_model.changed._entries.values())


def loss(model):
    return model(pixel_values=tiny.pixels()).logits.float().square().mean()


def grads(model):
    model.zero_grad(set_to_none=True)
    loss(model).backward()
    return {name: p.grad.clone() for name, p in trained(model).items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(params=["element", "row", "column"])
def pair(request):
    """A model that keeps, and one that does not, under autocast."""
    with AUTOCAST:
        models = adapted(request.param), adapted(request.param, keep=False)
        for model in models:
            for _ in range(2):
                tiny.output(model)
        assert kept(models[0])
        assert not kept(models[1])
        yield models


def test_outputs_and_gradients_are_the_same(pair):
    for _ in range(3):
        found, expected = (grads(model) for model in pair)
        assert same(found, expected)
        for model in pair:
            with torch.no_grad():
                for p in trained(model).values():
                    p.sub_(0.1 * p.grad)
        assert torch.equal(*(tiny.output(model) for model in pair))


def test_values_that_change_without_a_new_version_are_noticed(pair):
    for model in pair:
        for p in trained(model).values():
            p.data.add_(0.01)  # as bitsandbytes' optimizers and some averages of weights do
    assert torch.equal(*(tiny.output(model) for model in pair))
    assert same(*(grads(model) for model in pair))


@pytest.mark.parametrize("between", ["disabled", "another forward pass", "another adapter", "inference"])
def test_what_happens_between_forward_and_backward_does_not_matter(pair, between):
    found = []
    for model in pair:
        torch.manual_seed(1)
        config = SFAConfig(budget=0.05, initial_ticket="random", init_weights=False, keep_weights=model is pair[0])
        model.add_adapter("other", config)
        model.base_model.changed.always = None if model is pair[0] else False
        for _ in range(2):
            grads(model)
        model.zero_grad(set_to_none=True)
        value = loss(model)
        if between == "disabled":
            with torch.no_grad(), model.disable_adapter():
                tiny.output(model)
        elif between == "another forward pass":
            loss(model)
        elif between == "another adapter":
            model.set_adapter("other")
            for _ in range(3):
                tiny.output(model)
            model.set_adapter("default")
        else:
            with torch.inference_mode():
                tiny.output(model)
        value.backward()
        found.append({name: p.grad.clone() for name, p in trained(model).items()})
    assert same(*found)


def test_adapters_in_turn_share_the_memory():
    with AUTOCAST:
        models = adapted(share=0.0), adapted(share=0.0, keep=False)
        for model in models:
            torch.manual_seed(1)
            model.add_adapter("other", SFAConfig(budget=0.05, external_share=0.0, init_weights=False))
            model.base_model.changed.always = None if model is models[0] else False
        flats = set()
        for name in ("default", "other", "default", "other"):
            for model in models:
                model.set_adapter(name)
            for _ in range(3):
                assert torch.equal(*(tiny.output(model) for model in models))
            buffers = {id(e.buffer): e.buffer for e in models[0].base_model.changed._entries.values() if e.buffer}
            flats |= {buffer.flat.data_ptr() for buffer in buffers.values() if buffer.flat.dtype == torch.bfloat16}
        assert len(flats) == 1


def test_two_active_adapters_are_added():
    with AUTOCAST:
        models = adapted(), adapted(keep=False)
        for model in models:
            torch.manual_seed(1)
            model.add_adapter("other", SFAConfig(budget=0.05, initial_ticket="random", init_weights=False))
            model.base_model.changed.always = None if model is models[0] else False
            model.base_model.set_adapter(["default", "other"])
            for _ in range(2):
                tiny.output(model)
        assert torch.equal(*(tiny.output(model) for model in models))


def test_a_base_that_changes_is_read_again(pair):
    for model in pair:
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "base_layer" in name:
                    p.mul_(1.5)
    for _ in range(3):
        assert torch.equal(*(tiny.output(model) for model in pair))


def test_another_ticket_and_other_dtypes_are_read_again(pair):
    for model in pair:
        model.load_state_dict(adapted(str(ticket_of(model).granularity), keep=False, share=0.5).state_dict())
        model.double()
    for _ in range(3):
        assert torch.equal(*(tiny.output(model, tiny.pixels().double()) for model in pair))


def test_weights_that_were_rounded_in_between_are_read_again(pair):
    for model in pair:
        model.bfloat16().float()
    for _ in range(3):
        assert torch.equal(*(tiny.output(model) for model in pair))


def test_a_copy_is_independent(pair):
    model, expected = pair
    assert not pickle.loads(pickle.dumps(model.base_model.changed))._entries
    other = copy.deepcopy(model)
    assert not kept(other)
    with torch.no_grad():
        for p in trained(other).values():
            p.mul_(3)
    for _ in range(3):
        tiny.output(other)
    assert kept(other)
    assert torch.equal(tiny.output(model), tiny.output(expected))
    assert not torch.equal(tiny.output(other), tiny.output(model))


def test_a_model_that_was_first_run_in_inference_mode_can_be_trained():
    with AUTOCAST:
        models = adapted(), adapted(keep=False)
        for model in models:
            with torch.inference_mode():
                for _ in range(3):
                    tiny.output(model)
        assert kept(models[0])
        assert same(*(grads(model) for model in models))


def test_gradient_checkpointing(pair):
    found = []
    for model in pair:
        model.zero_grad(set_to_none=True)
        first = checkpoint(lambda x, model=model: model(pixel_values=x).logits, tiny.pixels(), use_reentrant=False)
        second = checkpoint(lambda x, model=model: model(pixel_values=x).logits, tiny.pixels(), use_reentrant=False)
        (first * second).float().mean().backward()
        found.append({name: p.grad for name, p in trained(model).items()})
    assert same(*found)


def test_float32_without_autocast_keeps_nothing_unless_it_is_asked_for():
    model = adapted()
    for _ in range(3):
        grads(model)
    assert not kept(model)
    other = adapted(keep=True)
    for _ in range(3):
        found = grads(other)
    assert kept(other)
    assert same(found, grads(model))
    other.merge_adapter()
    assert not kept(other)
    assert torch.allclose(tiny.output(other), tiny.output(model), atol=1e-5)


def test_threads(pair):
    model, expected = pair
    outputs = []
    threads = [threading.Thread(target=lambda: outputs.extend(output(model) for _ in range(5))) for _ in range(3)]

    def output(model):
        with AUTOCAST:
            return tiny.output(model)

    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(outputs) == 15
    right = tiny.output(expected)
    assert all(torch.equal(one, right) for one in outputs)


def test_swin_and_its_convolutions():
    with AUTOCAST:
        options = {"make": tiny.swin, "target_modules": ["projection", "fc1", "reduction"], "share": 0.0}
        models = adapted(**options), adapted(keep=False, **options)
        for model in models:
            for _ in range(2):
                tiny.output(model)
        assert kept(models[0])
        assert same(*(grads(model) for model in models))


def test_values_that_are_no_parameters_are_read_where_they_are(pair):
    for model in pair:
        internal = next(m for m in model.modules() if type(m).__name__ == "SparseDelta" and "weight" in m.changed)
        prune.l1_unstructured(internal, "weight", amount=0.5)
    assert torch.equal(tiny.output(pair[0]), tiny.output(pair[1]))
    assert same(grads(pair[0]), grads(pair[1]))


def test_a_replica_of_data_parallel_computes_the_same(pair):
    for model in pair:
        assert torch.equal(tiny.output(tiny.replica(model)), tiny.output(model))
