"""A change of a model is made as a whole or not at all, wherever an error or an interrupt comes."""

import contextlib
import random
import signal
import sys
import threading
from pathlib import Path

import peft
import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from peft.utils.hotswap import hotswap_adapter
from torch.utils._python_dispatch import TorchDispatchMode

import sfa_peft
import tiny
from adapters import disturb
from sfa_peft import SFAConfig, extract_adapter, install_ticket, search_ticket, ticket_of
from sfa_peft.tuner import optimizers, rollback
from sfa_peft.tuner.rollback import Rollback, Uninterrupted

TRACED = (str(Path(sfa_peft.__file__).parent), str(Path(peft.__file__).parent), contextlib.__file__)
TARGETS = ["o_proj", "fc2", "layernorm_after"]
OPTIONS = {"budget": 150, "external_places": ["attention", "block"], "modules_to_save": ["pooler"]}
OPTIONS |= {"target_modules": TARGETS, "external_conv": 3}


@pytest.fixture(autouse=True)
def pythons_handler():
    """A shell starts processes in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def no_search_for_optimizers(monkeypatch):
    """Reading all objects of the process takes most of the time."""
    monkeypatch.setattr(optimizers.gc, "get_objects", list)


def base():
    return tiny.vit(num_hidden_layers=1).bfloat16()  # so that adapters are cast


def adapted(**options):
    return get_peft_model(base(), SFAConfig(**OPTIONS | options)).train()


def of_three():
    """A model with a new adapter, a merged one and a trained one that is not active."""
    model = adapted()
    for name, places in (("merged", ["mlp"]), ("third", [])):
        options = {
            "target_modules": TARGETS,
            "external_places": places,
            "external_conv": 3,
            "initial_ticket": "random",
        }
        model.add_adapter(name, SFAConfig(budget=90, external_share=0.5 if places else 0, **options))
        disturb(model, name)
    model.base_model.model.embeddings.eval()
    model.merge_adapter(["merged"])
    return model


def trained():
    model = of_three()
    model.unmerge_adapter()
    disturb(model, "default")
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A trained adapter with another ticket, in a folder."""
    model = adapted(initial_ticket="random")
    disturb(model, "default")
    model.save_pretrained(folder := tmp_path_factory.mktemp("saved"))
    return folder


steps = []  # of the searches


def loss(model, batch):
    steps.append(batch)
    return model(batch).pooler_output.square().mean()


def search(model, **options):
    options = {"steps": 1, "criterion": "gradient", "loss_fn": loss, "progress": False} | options
    return search_ticket(model, [tiny.pixels(1).bfloat16()], **options)


def installing(saved):
    model, ticket = of_three(), ticket_of(adapted(initial_ticket="random"))
    model.unmerge_adapter()
    return model, lambda: install_ticket(model, ticket)


def loading_a_state_dict(saved):
    model = trained()
    tensors = get_peft_model_state_dict(model)
    disturb(model, "default")
    return model, lambda: set_peft_model_state_dict(model, tensors)


def extracting(saved):
    model, finetuned = base(), base()
    with torch.no_grad():
        finetuned.layers[0].mlp.fc1.bias.add_(1)
    return model, lambda: extract_adapter(model, finetuned, budget=10)


def searching(saved, **options):
    model = of_three()
    model.unmerge_adapter()
    return model, lambda: search(model, **options)


def of(make, change):
    def made(saved):
        model = make()
        return model, lambda: change(model, saved)

    return made


def placing(saved):
    model = adapted(external_placement="auto", external_share=0.5, external_conv=0)
    return model, lambda: search(model, criterion="magnitude")


MANY = {"install_ticket": 35, "search_ticket": 35}  # interrupts
# Each makes a model, and gives it with a change of it.
CHANGES = {
    "get_peft_model": of(base, lambda model, saved: get_peft_model(model, SFAConfig(**OPTIONS))),
    "from_pretrained": of(base, PeftModel.from_pretrained),
    "add_adapter": of(of_three, lambda model, saved: model.add_adapter("new", SFAConfig(**OPTIONS))),
    "load_adapter": of(of_three, lambda model, saved: model.load_adapter(saved, "new")),
    "load_adapter into one": of(adapted, lambda model, saved: model.load_adapter(saved, "default")),
    "hotswap": of(trained, lambda model, saved: hotswap_adapter(model, saved, "default")),
    "set_peft_model_state_dict": loading_a_state_dict,
    "install_ticket": installing,
    "extract_adapter": extracting,
    "search_ticket": searching,
    "search_ticket with probes": placing,
    "add_weighted_adapter": of(
        trained, lambda model, saved: model.base_model.add_weighted_adapter(["default", "third"], [0.5, 2.0], "new")
    ),
    "delete_adapter": of(trained, lambda model, saved: model.delete_adapter("default")),
    "merge_adapter": of(trained, lambda model, saved: model.merge_adapter(["default", "third"])),
    "merge_and_unload": of(trained, lambda model, saved: model.merge_and_unload()),
}


def state_of(model):
    """All that must be as before: the very same objects, with the same values, flags, modes, hooks and settings."""
    found = {"state": list(tiny.state(model).items())}
    for name, module in model.named_modules():
        hooks = [*module._forward_hooks.items(), *module._forward_pre_hooks.items()]
        found[name] = [module, module.training, hooks]
        found[name] += [getattr(module, n, None) for n in ("in_features", "out_features", "config")]
        if isinstance(module, BaseTunerLayer | ModulesToSaveWrapper):
            found[name] += [list(module.active_adapters), module.disable_adapters]
            found[name] += [getattr(module, "searching", None), dict(getattr(module, "parallel_inputs", {}))]
            found[name] += [list(getattr(module, "merged_adapters", ()))]
    found["parameters"] = [(n, id(p), p.requires_grad, p.grad) for n, p in model.named_parameters()]
    found["buffers"] = [(n, id(b)) for n, b in model.named_buffers()]
    found["attributes"] = sorted(vars(model)), torch.is_grad_enabled()
    if isinstance(model, PeftModel):
        found["configs"] = {name: config.to_dict() for name, config in model.peft_config.items()}
        found["active"] = list(model.base_model.active_adapters)
    return found


def difference(found, before):
    """The first difference between two states; None if there is none."""
    for name in before | found:
        if name != "state" and found.get(name) != before.get(name):
            return name, found.get(name), before.get(name)
    for (name, tensor), (other, value) in zip(found["state"], before["state"], strict=True):
        if name != other or not torch.equal(tensor, value):
            return name, other
    return None


def again(change):
    torch.manual_seed(0)
    return change()


def result_of(name, saved):
    """The state of a model after a change that nothing disturbs."""
    model, change = CHANGES[name](saved)
    again(change)
    return tiny.state(model)


class OutOfMemoryError(RuntimeError):
    pass


class FailingAt(TorchDispatchMode):
    """Raises an error once, at the n-th operation that makes a tensor or writes into one."""

    VIEWS = ("view", "detach", "expand", "t", "transpose", "alias", "slice", "select", "unbind", "_local_scalar_dense")

    def __init__(self, n):
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ not in self.VIEWS:
            self.left -= 1
            if self.left == 0:
                raise OutOfMemoryError(function.name())
        return function(*args, **kwargs or {})


def failed_at(n, change):
    """Make a change in which the n-th operation fails. Whether it failed."""
    failing = FailingAt(n)
    try:
        with failing:
            again(change)
    except Exception:  # torch and safetensors may make another error of it
        if failing.left > 0:
            raise
        return True
    return False


@pytest.mark.parametrize("name", CHANGES)
def test_an_error_at_any_operation_leaves_the_model_as_it_was(name, saved):
    model, change = CHANGES[name](saved)
    before, n = state_of(model), 1
    steps.clear()
    while failed_at(n, change):
        found = difference(state_of(model), before)
        assert found is None, (n, found)
        n += 9 if steps else 1  # the steps of a search have many operations
    assert tiny.same_state(tiny.state(model), result_of(name, saved))


def interrupted_at(n, change):
    """Make a change, and interrupt it at the n-th line. The number of lines."""
    lines = 0

    def trace(frame, event, _):
        nonlocal lines
        if event == "call":
            return trace if frame.f_code.co_filename.startswith(TRACED) else None
        if event == "line":
            lines += 1
            if lines == n:
                signal.raise_signal(signal.SIGINT)
        return trace

    sys.settrace(trace)
    try:
        again(change)
    except KeyboardInterrupt:  # not suppressed by contextlib, which is interrupted too
        pass
    finally:
        sys.settrace(None)
    return lines


@pytest.mark.parametrize("name", CHANGES)
def test_an_interrupt_at_any_line_changes_nothing_or_all(name, saved):
    (model, change), result = CHANGES[name](saved), result_of(name, saved)
    before = state_of(model)
    lines = interrupted_at(0, CHANGES[name](saved)[1])
    points = random.Random(name)
    for n in (*(points.randint(1, lines) for _ in range(MANY.get(name, 15))), *range(lines - 5, lines)):
        interrupted_at(n, change)
        if difference(state_of(model), before):
            assert tiny.same_state(tiny.state(model), result), (n, difference(state_of(model), before))
            model, change = CHANGES[name](saved)
            before = state_of(model)


def test_a_second_interrupt_waits_until_the_model_is_restored(monkeypatch):
    model = adapted()
    before, put_back = state_of(model), rollback._put_back
    interrupts = []

    def interrupting(*args):
        if not interrupts:
            interrupts.append(signal.raise_signal(signal.SIGINT))
        put_back(*args)

    monkeypatch.setattr(rollback, "_put_back", interrupting)

    def change():
        with Rollback(model):
            model.base_model.unload()
            raise OutOfMemoryError

    with pytest.raises(KeyboardInterrupt) as raised:
        change()
    assert interrupts == [None]
    assert isinstance(raised.value.__context__, OutOfMemoryError)
    assert difference(state_of(model), before) is None


def test_interrupts_are_delayed_only_in_the_main_thread_and_the_handler_stays():
    handler, done = signal.getsignal(signal.SIGINT), []

    def delayed():
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append(signal.getsignal(signal.SIGINT))

    with pytest.raises(KeyboardInterrupt):
        delayed()
    assert len(done) == 1
    assert signal.getsignal(signal.SIGINT) is handler

    entered = []

    def in_another_thread():
        with Uninterrupted():
            entered.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=in_another_thread)
    thread.start()
    thread.join()
    assert entered == [handler]
    ignored = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, ignored)


def test_containers_are_restored_in_place_and_tensors_that_were_added_are_gone():
    model = adapted()
    layer = next(m for m in model.modules() if isinstance(m, BaseTunerLayer))
    hooks, before = layer._forward_hooks, state_of(model)
    with Rollback(model) as back:
        handle = layer.register_forward_hook(print)
        model.eval().requires_grad_(True)
        layer.register_buffer("more", torch.zeros(1))
        model.peft_config["default"].ticket_sizes = None
        back.restore()
    assert layer._forward_hooks is hooks
    assert difference(state_of(model), before) is None
    handle.remove()  # as if it were still there
