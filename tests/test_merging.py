import copy
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny
from adapters import trained
from sfa_peft import SFAConfig, SFALayer, search_ticket
from sfa_peft.tuner.folding import ExternalsKeptWarning

PLACES = {"sequential": ["attention", "mlp"], "parallel": ["attention", "mlp_parallel"], "block": ["mlp", "block"]}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["element", "row", "column"])
def test_unmerging_gives_back_the_base_bit_for_bit(dtype, granularity):
    base = tiny.swin().to(dtype)
    before = {n: p.clone() for n, p in base.named_parameters()}
    config = {
        "internal_density": 0.3,
        "external_modules": [],
        "internal_granularity": granularity,
    }
    model = get_peft_model(base, SFAConfig(**config, init_weights=False))
    model.add_adapter("other", SFAConfig(**config, initial_ticket="random", init_weights=False))
    model.merge_adapter()
    model.merge_adapter(["other"])
    merged = {n.replace(".base_layer", ""): p for n, p in base.named_parameters() if ".sfa_" not in n}
    assert any(not torch.equal(merged[n], p) for n, p in before.items())
    model.unmerge_adapter()
    assert all(torch.equal(merged[n], p) for n, p in before.items())


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_merged_model_computes_the_same(places):
    model = trained(external_places=places)
    expected = tiny.output(model)
    model.merge_adapter()
    assert torch.equal(tiny.output(model), expected)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(tiny.output(model), expected)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_merge_and_unload_gives_a_plain_model(places):
    model = trained(external_places=places)
    expected = tiny.output(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExternalsKeptWarning)
        plain = model.merge_and_unload(safe_merge=True, widen=False)
    assert torch.equal(tiny.output(plain), expected)
    assert not any(isinstance(m, SFALayer) for m in plain.modules())
    assert not hasattr(plain, "peft_config")
    assert torch.equal(tiny.output(copy.deepcopy(plain)), expected)


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_unload_gives_back_the_base(places):
    base = tiny.swin()
    before, expected = tiny.state(base), tiny.output(base)
    model = get_peft_model(base, SFAConfig(budget=0.1, external_places=places, modules_to_save=["decode_head"]))
    tiny.train(model)
    model.merge_adapter()
    unloaded = model.unload()
    assert tiny.same_state(tiny.state(unloaded), before)
    assert torch.equal(tiny.output(unloaded), expected)
    hooks = [h for m in unloaded.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    assert not any(type(hook).__module__.startswith("sfa_peft") for hook in hooks)


def test_disabling_gives_the_base_also_when_merged():
    base = tiny.swin()
    expected = tiny.output(base)
    model = tiny.train(get_peft_model(base, SFAConfig(budget=0.1, modules_to_save=["decode_head"])))
    adapted = tiny.output(model)
    assert not torch.equal(adapted, expected)
    with model.disable_adapter():
        assert torch.equal(tiny.output(model), expected)
    assert torch.equal(tiny.output(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(tiny.output(model), expected)


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_refuses_what_is_not_finite_and_changes_nothing(merge):
    model = trained(budget=0.1, external_places=["attention"])
    model.add_adapter("other", SFAConfig(budget=0.1, init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    last = [m for m in model.modules() if isinstance(m, SFALayer) and "other" in m.sfa_internal][-1]
    with torch.no_grad():
        next(last.sfa_internal["other"].parameters())[0] = float("inf")
    before = tiny.state(model)
    with pytest.raises(ValueError, match=r"'other' would make.*non-finite"):
        getattr(model, merge)(safe_merge=True)
    assert tiny.same_state(before, tiny.state(model))
    assert not any(m.merged for m in model.modules() if isinstance(m, SFALayer))


def test_a_safe_merge_into_half_precision_refuses_what_overflows():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), SFAConfig(internal_density=0.5, target_modules=["0"]))
    layer = model.base_model.model[0]
    nn.init.constant_(layer.sfa_internal["default"].weight, 1e5)
    model.base_model.model.half()
    layer.sfa_internal["default"].float()
    with pytest.raises(ValueError, match=r"too large for torch\.float16"):
        model.merge_adapter(safe_merge=True)


def test_two_adapters_merge_to_their_sum():
    model = trained()
    model.add_adapter(
        "other", SFAConfig(budget=0.1, init_weights=False, external_places=["attention", "mlp_parallel"])
    )
    model.base_model.set_adapter(["default", "other"])
    expected = tiny.output(model)
    model.merge_adapter()
    assert torch.allclose(tiny.output(model), expected, atol=1e-6)


def test_a_copy_of_the_model_is_independent():
    model = trained(external_places=["attention", "mlp_parallel"])
    expected = tiny.output(model)
    other = copy.deepcopy(model)
    tiny.train(other)
    assert torch.equal(tiny.output(model), expected)
    assert not torch.equal(tiny.output(other), expected)


def shared_parameters():
    tied = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    tied[1].weight = tied[0].weight
    twice = nn.Linear(8, 8)
    return {"tied": tied, "twice": nn.Sequential(twice, nn.ReLU(), twice)}


@pytest.mark.parametrize("kind", ["tied", "twice"])
def test_shared_parameters_are_adapted_in_one_place_but_not_merged(kind):
    base = shared_parameters()[kind]
    x = torch.randn(3, 8)
    before = base(x)
    with pytest.warns(UserWarning, match=r"shares its parameter.*0\.weight"):
        model = get_peft_model(base, SFAConfig(internal_density=0.5, target_modules=["0"], init_weights=False))
    layer = base[0]
    weight, bias = (getattr(layer.base_layer, n) + layer.get_delta_weight("default", n) for n in ("weight", "bias"))
    inner = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(model(x), base[1:](inner))  # there the weight is as it was
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"cannot be merged.*shared"):
            merge()
    assert torch.equal(model.unload()(x), before)


def test_a_search_on_shared_parameters_is_refused():
    config = SFAConfig(internal_density=0.5, target_modules=["0"])
    with pytest.warns(UserWarning, match="shares its parameter"):
        model = get_peft_model(shared_parameters()["tied"], config)
    with pytest.raises(ValueError, match="one shared parameter"):
        search_ticket(model, [{"input": torch.randn(3, 8)}], steps=1, progress=False)


def test_external_adapters_on_shared_modules_need_no_warning():
    base = shared_parameters()["tied"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = get_peft_model(base, SFAConfig(external_width=2, target_modules=[], external_modules=["0"]))
    model.merge_adapter()


def test_a_merged_model_is_not_adapted_on_top_of_its_externals():
    with pytest.warns(ExternalsKeptWarning):
        plain = trained(external_places=["attention"]).merge_and_unload()
    with pytest.raises(ValueError, match="earlier merge_and_unload"):
        get_peft_model(plain, SFAConfig(budget=0.1))


def test_deleting_leaves_the_other_adapter_active():
    model = trained(budget=None, external_width=2, external_places=["attention"], searched=False)
    model.add_adapter("other", SFAConfig(budget=0.1, modules_to_save=["decode_head"], external_places=["mlp"]))
    model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert all(layer.active_adapters == ["other"] for layer in model.modules() if isinstance(layer, SFALayer))
    tiny.output(model)


def test_threads_do_not_mix_up_parallel_inputs():
    model = get_peft_model(
        tiny.vit(), SFAConfig(external_width=4, external_places=["mlp_parallel"], init_weights=False)
    ).eval()
    images = [tiny.pixels(seed=i) for i in range(4)]
    expected = [tiny.output(model, x) for x in images]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: tiny.output(model, images[i % 4]), range(40)))
    assert all(torch.equal(y, expected[i % 4]) for i, y in enumerate(found))


@pytest.mark.parametrize("gradients", [True, False])
def test_compiling_has_no_graph_break(gradients):
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8)),
        SFAConfig(budget=120, target_modules=["0", "1", "2"], external_modules=["2"], init_weights=False),
    )
    x = torch.randn(3, 8)
    with torch.set_grad_enabled(gradients):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert torch.allclose(compiled(x), model(x), atol=1e-6)
