"""Several threads run one model at the same time: each gets exactly what it would get alone."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from peft import get_peft_model
from torch import nn

import tiny
from adapters import disturb
from sfa_peft import SFAConfig
from sfa_peft.layers.granularity import Element

NAMES = [
    ["both", "__base__", "external", "internal"],
    ["internal", "both", "both", "__base__"],
    None,  # the active adapter
    ["external"] * 4,
]
SECONDS = 60


@pytest.fixture(scope="module")
def model():
    config = SFAConfig(budget=0.1, modules_to_save=["decode_head"])
    model = get_peft_model(tiny.swin(), config, adapter_name="both")
    model.add_adapter("external", SFAConfig(budget=0.05, target_modules=[], external_places=["mlp_parallel"]))
    model.add_adapter("internal", SFAConfig(budget=0.05, external_places=[], modules_to_save=["decode_head"]))
    for name in ("both", "external", "internal"):
        disturb(model, name)
    model.set_adapter("internal")
    return model.eval()


@pytest.fixture(scope="module")
def images():
    return [tiny.pixels(4, seed=i) for i in range(len(NAMES))]


@torch.no_grad()
def run(model, x, names=None):
    return (model(x) if names is None else model(x, adapter_names=names)).logits


def middles(model):
    """Modules in the middle of a forward pass: between two SFA layers, and between the backbone and the head."""
    base = model.base_model.model
    return [base.get_submodule("backbone.swin.encoder.layers.1.blocks.0.mlp"), base.decode_head]


@contextmanager
def hooked(modules, hook):
    def run_hook(*_):
        hook()

    handles = [module.register_forward_pre_hook(run_hook) for module in modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def meeting(model, count):
    """No thread goes on from a middle of the model before all of them are there."""
    barrier = threading.Barrier(count, timeout=SECONDS)
    return hooked(middles(model), barrier.wait)


def in_threads(functions):
    with ThreadPoolExecutor(len(functions)) as pool:
        futures = [pool.submit(function) for function in functions]
        return [future.result(SECONDS) for future in futures]


def test_threads_that_meet_in_the_middle_get_what_each_gets_alone(model, images):
    expected = [run(model, x, names) for x, names in zip(images, NAMES, strict=True)]
    assert len({y.sum().item() for y in expected}) == len(NAMES)
    with meeting(model, len(NAMES)):
        found = in_threads([lambda i=i: run(model, images[i], NAMES[i]) for i in range(len(NAMES))])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("waiting", range(3))
@pytest.mark.parametrize("whole", range(3))
def test_a_whole_call_inside_another_threads_call_changes_neither(model, images, waiting, whole):
    x = images[0]
    expected = [run(model, x, names) for names in NAMES]
    is_there, may_go_on = threading.Event(), threading.Event()
    first = []

    def stop_the_first():
        if threading.get_ident() in first and not is_there.is_set():
            is_there.set()
            assert may_go_on.wait(SECONDS)

    def wait():
        first.append(threading.get_ident())
        return run(model, x, NAMES[waiting])

    with hooked(middles(model)[:1], stop_the_first), ThreadPoolExecutor(1) as pool:
        future = pool.submit(wait)
        assert is_there.wait(SECONDS)
        try:
            second = run(model, x, NAMES[whole])
        finally:
            may_go_on.set()
        assert torch.equal(future.result(SECONDS), expected[waiting])
    assert torch.equal(second, expected[whole])


def test_an_error_in_one_thread_touches_no_other(model, images):
    expected = [run(model, x, names) for x, names in zip(images, NAMES, strict=True)]
    broken = []

    def break_here():
        if threading.get_ident() in broken:
            raise ZeroDivisionError

    def fail_and_try_again():
        broken.append(threading.get_ident())
        with pytest.raises(ZeroDivisionError):
            run(model, images[0], NAMES[0])
        broken.clear()
        return run(model, images[2])  # in the same thread, nothing is left of the mixed batch

    # The other threads are in the middle while the first one fails.
    with hooked(middles(model)[1:], break_here), ThreadPoolExecutor(1) as pool:
        once = threading.Lock()
        failed = []

        def fail_meanwhile():
            if once.acquire(blocking=False):
                failed.append(pool.submit(fail_and_try_again).result(SECONDS))

        with hooked(middles(model)[:1], fail_meanwhile):
            found = run(model, images[1], NAMES[1])
    assert torch.equal(found, expected[1])
    assert torch.equal(failed[0], expected[2])


def test_a_call_inside_a_call(model, images):
    expected = [run(model, images[0], names) for names in NAMES]
    inner = []

    def call_once():
        if not inner:
            inner.append(None)
            inner[0] = run(model, images[0], NAMES[1])

    with hooked(middles(model)[1:], call_once):
        outer = run(model, images[0], NAMES[0])
    assert torch.equal(inner[0], expected[1])
    assert torch.equal(outer, expected[0])


def test_another_model_that_is_called_inside_keeps_its_active_adapter(model, images):
    other = get_peft_model(tiny.swin(seed=1), SFAConfig(budget=0.1, init_weights=False)).eval()
    expected = run(other, images[0])
    found = []
    with hooked(middles(model), lambda: found.append(run(other, images[0]))):
        run(model, images[0], NAMES[0])
    assert len(found) == 2
    assert all(torch.equal(y, expected) for y in found)


def test_replicas_in_threads(model, images):
    expected = [run(model, x, names) for x, names in zip(images, NAMES, strict=True)]
    with meeting(model, len(NAMES)):  # the replicas have these hooks too
        replicas = [tiny.replica(model) for _ in NAMES]
        found = in_threads([lambda i=i: run(replicas[i], images[i], NAMES[i]) for i in range(len(NAMES))])
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_first_forward_pass_that_unmerges_is_waited_for_by_other_threads(images, monkeypatch):
    base = tiny.swin()
    expected = run(base, images[0])
    model = get_peft_model(base, SFAConfig(budget=0.1)).eval()
    disturb(model, "default")
    before = tiny.state(model)
    model.merge_adapter()
    write, is_inside, is_done = Element.write, threading.Event(), threading.Event()

    def slow_write(*args):
        if not is_inside.is_set():  # the second thread runs while the first one is here
            is_inside.set()
            is_done.wait(0.3)
        write(*args)

    def second():
        assert is_inside.wait(SECONDS)
        result = run(model, images[0])
        is_done.set()
        return result

    monkeypatch.setattr(Element, "write", slow_write)
    with model.disable_adapter():
        found = in_threads([lambda: run(model, images[0]), second])
    assert all(torch.equal(y, expected) for y in found)
    assert tiny.same_state(tiny.state(model), before)


def test_a_model_that_splits_the_batch_inside_is_refused(model, images):
    base = model.base_model.model
    head = base.decode_head
    base.decode_head = nn.DataParallel(head)
    try:
        base.decode_head.device_ids = [0, 1]
        with pytest.raises(ValueError, match="put the PEFT model into"):
            run(model, images[0], NAMES[0])
    finally:
        base.decode_head = head


def test_a_compiled_model_has_no_graph_break_and_notices_the_mixed_batches_of_its_thread():
    torch.manual_seed(0)
    options = {"target_modules": ["0", "1"], "external_modules": ["2"], "init_weights": False}
    base = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8))
    model = get_peft_model(base, SFAConfig(budget=80, **options), adapter_name="both")
    model.add_adapter("external", SFAConfig(budget=50, **options | {"target_modules": []}))
    model.eval()
    x, names = torch.randn(4, 8), [None, ["both", "external", "__base__", "both"], ["external"] * 4]

    @torch.no_grad()
    def result(names=None):
        return model(x) if names is None else model(x, adapter_names=names)

    expected = [result(n) for n in names]
    base.forward = torch.compile(base.forward, backend="eager", fullgraph=True)
    for i in (0, 1, 2, 0, 1):
        torch.testing.assert_close(result(names[i]), expected[i])
    barrier = threading.Barrier(len(names), timeout=SECONDS)
    with hooked([base], barrier.wait):
        found = in_threads([lambda n=n: result(n) for n in names])
    torch.testing.assert_close(found, expected)
