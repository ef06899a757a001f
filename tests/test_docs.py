"""The documentation runs: each Python snippet and each example of a docstring; commands and links are checked."""

import argparse
import ast
import doctest
import inspect
import itertools
import re
import runpy
import shlex
import sys
import tomllib
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import huggingface_hub
import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import SegformerImageProcessorPil, SwinBackbone, Trainer, TrainingArguments

import pages
import sfa_peft
import tiny
from adapters import BATCHES, adapted, disturb, trained
from pages import PAGES, ROOT
from sfa_peft import SFAConfig, describe_adapter, search_ticket
from sfa_peft.cli import main as sfa_peft_command
from sfa_peft.planning import registry

# What is not run here, and why.
NOT_RUN = {
    "docs/deploying.md#quantize-after-the-merge": "needs torchao; tests/test_quantized.py runs it",
}
if Version(transformers.__version__) < Version("5.18"):
    NOT_RUN["docs/compatibility.md#dinov2-before-transformers-518-and-after"] = "DINOv2 has the older names here"
# Searches and trainings of the documentation are long.
SHORTER = {"steps=200": "steps=2"}


@pytest.fixture(autouse=True)
def _alone(hub, tmp_path, monkeypatch):
    """A folder, a Hub and its cache, warnings and a register of architectures of a test's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "cache"))
    registry.registered_architectures()
    monkeypatch.setattr(registry, "_registered", dict(registry._registered))
    monkeypatch.setattr(registry, "_by_block", {block: list(of) for block, of in registry._by_block.items()})
    with warnings.catch_warnings():  # what a page shows gives no warning
        warnings.simplefilter("error", UserWarning)
        yield


@dataclass
class Page:
    """What the snippets of a page assume, and what must be true after them.

    Attributes:
        names: Makes the names that the first snippet finds; those of a snippet stay for the next ones.
        again: Makes names anew before each snippet, where a reader would choose between snippets.
        after: What is checked after a snippet, by the snippet's anchor.
    """

    names: Callable[[], dict]
    again: Callable[[], dict] = dict
    after: dict[str, Callable[[dict], None]] = field(default_factory=dict)


def processor():
    return SegformerImageProcessorPil(size={"height": tiny.SIZE, "width": tiny.SIZE})


def on_hub(make, name):
    """A model that was loaded from the Hub, and whose name an adapter therefore knows."""
    model = make()
    model.push_to_hub(name)
    return type(model).from_pretrained(name)


def same(model, other):
    return torch.equal(tiny.output(model), tiny.output(other))


# README.md


def loads_alone(names):
    assert names["processor"].size == processor().size
    assert set(names["id2label"]) == {0, 1, 2}
    assert torch.isfinite(tiny.output(names["model"])).all()


# docs/architectures.md


class Custom(nn.Module):
    """Blocks that no description knows."""

    def __init__(self):
        super().__init__()
        block = {"qkv": nn.Linear(64, 64), "proj": nn.Linear(64, 64)}
        mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(64, 256), act=nn.GELU(), fc2=nn.Linear(256, 64)))
        self.blocks = nn.ModuleList([nn.ModuleDict({**block, "mlp": mlp})])

    def forward(self, x):
        for block in self.blocks:
            x = x + block["proj"](block["qkv"](x))
            x = x + block["mlp"](x)
        return x


def finds_the_pvt(names):
    config = transformers.PvtConfig(
        image_size=64, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], num_attention_heads=[1, 1, 1, 1]
    )
    every = SFAConfig(budget=0.2, external_places=("attention", "mlp", "mlp_parallel", "block"))
    model = get_peft_model(transformers.PvtModel(config), every)
    found = model.peft_config["default"]
    assert set(found.external_widths) == {"attention", "mlp", "mlp_parallel", "block"}
    assert "encoder.block.0.0.attention.self.sequence_reduction.weight" in found.ticket_sizes
    model(tiny.pixels(size=64)).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def finds_the_modules(names):
    found = get_peft_model(Custom(), names["config"]).peft_config["default"]
    assert list(found.external_widths) == ["module_parallel"]


# docs/choosing.md


def has_three_rates(names):
    assert [group["name"] for group in names["optimizer"].param_groups] == ["head", "external", "internal"]


def trains(names):
    before = tiny.state(names["model"])
    names["trainer"].train()
    assert not tiny.same_state(tiny.state(names["model"]), before)


def of_choosing():
    args = TrainingArguments("out", max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True)
    rows = [{name: tensor[0] for name, tensor in tiny.batch(seed=i).items()} for i in range(4)]
    return {"base": tiny.swin(), "train_loader": BATCHES, "Trainer": Trainer, "args": args, "rows": rows}


# docs/compatibility.md


def older(model):
    """DINOv2 with the names that it had before transformers 5.18. It does not run."""
    for layer in model.backbone.encoder.layer:
        now, layer.attention = layer.attention, nn.Module()
        layer.attention.attention, layer.attention.output = nn.Module(), nn.Module()
        for name in ("query", "key", "value"):
            layer.attention.attention.add_module(name, getattr(now, f"{name[0]}_proj"))
        layer.attention.output.dense = now.o_proj
    return model


def of_compatibility():
    """An adapter that was saved with the old names."""
    model = trained(make=tiny.dinov2)
    model.save_pretrained("now")
    names = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
    mapping = {rf"attention\.{a}\b": f"attention.{b}" for a, b in {**names, "o_proj": "output.dense"}.items()}
    PeftModel.from_pretrained(older(tiny.dinov2()), "now", key_mapping=mapping).push_to_hub("me/dinov2-depth")
    return {"base": tiny.dinov2(), "PeftModel": PeftModel, "expected": tiny.output(model)}


def loads_the_older_one(names):
    assert torch.equal(tiny.output(names["model"]), names["expected"])
    with pytest.raises(sfa_peft.CheckpointError, match="architecture"):
        PeftModel.from_pretrained(tiny.dinov2(), "me/dinov2-depth")


# docs/concepts.md


def has_the_defaults(names):
    found, default = (
        get_peft_model(tiny.swin(), config).peft_config["default"]
        for config in (names["config"], SFAConfig(modules_to_save=["decode_head"]))
    )
    assert found.external_widths == default.external_widths
    assert found.ticket_sizes == default.ticket_sizes


# docs/deploying.md


def of_deploying():
    model = adapted(init_weights=False, external_conv=0)
    return {"SFAConfig": SFAConfig, "model": model, "pixel_values": tiny.pixels(), "expected": tiny.output(model)}


def is_the_same(name):
    def check(names):
        found = names[name] if name == "logits" else tiny.output(names[name])
        torch.testing.assert_close(torch.as_tensor(found), names["expected"], rtol=0, atol=1e-5)

    return check


def is_that_of_the_folder(names):
    torch.testing.assert_close(tiny.output(names["plain"]), tiny.output(names["merged"]), rtol=0, atol=1e-5)


# docs/performance.md


def of_performance():
    config = SFAConfig(budget=0.1, init_weights=False, layers_to_transform=[10, 11], modules_to_save=["decode_head"])
    model = get_peft_model(tiny.dinov2(num_hidden_layers=12), config, adapter_name="segmentation").eval()
    for task in ("detection", "depth"):
        model.add_adapter(task, config)
        disturb(model, task)
    names = {"SFAConfig": SFAConfig, "sfa_peft": sfa_peft, "torch": torch}
    return {**names, "model": model, "pixel_values": tiny.pixels()}


def shares(names):
    for task, output in names["outputs"].items():
        names["model"].set_adapter(task)
        assert torch.equal(output.logits, tiny.output(names["model"]))
    get_peft_model(tiny.dinov2(num_hidden_layers=12), names["config"])


# docs/saving.md


def of_saving():
    model = get_peft_model(
        on_hub(tiny.swin, "me/swin-nano"), SFAConfig(budget=0.1, modules_to_save=["decode_head"], init_weights=False)
    )
    four = tiny.swin_config(image_size=64, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
    SwinBackbone(four).push_to_hub("microsoft/swin-tiny-patch4-window7-224")
    names = {"PeftModel": PeftModel, "processor": processor(), "image": Image.new("RGB", (50, 40))}
    return {**names, "model": model, "expected": tiny.output(model)}


def is_saved(names):
    assert torch.equal(tiny.output(names["model"]), names["expected"])
    assert {path.name for path in Path("out").iterdir()} == {
        "adapter_config.json", "adapter_model.safetensors", "base_config.json", "README.md", "ticket.png"
    }  # fmt: skip


def is_on_the_hub(names):
    assert torch.equal(tiny.output(names["model"]), names["expected"])


def stands_alone(names):
    assert names["outputs"].logits.shape == (1, 3, tiny.SIZE, tiny.SIZE)


def names_the_backbone(names):
    adapted = get_peft_model(names["base"], SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    adapted.save_pretrained("on a backbone")
    assert adapted.peft_config["default"].base_model_name_or_path == "microsoft/swin-tiny-patch4-window7-224"
    loaded = sfa_peft.load_dense("on a backbone")
    assert same(adapted, loaded.model)
    assert loaded.id2label == names["id2label"]


def refuses_another_base(names):
    with pytest.raises(sfa_peft.BaseMismatchWarning):
        PeftModel.from_pretrained(tiny.swin(seed=5), "out")


def is_in_the_card(names):
    names["model"].save_pretrained("described")
    assert "0.471" in Path("described/README.md").read_text()


# docs/tickets.md


def of_tickets():
    other = adapted()
    names = {"sfa_peft": sfa_peft, "train_loader": BATCHES, "base": tiny.swin(), "finetuned": tiny.train(tiny.swin())}
    another = search_ticket(other, BATCHES, steps=1, progress=False)
    return {**names, "model": adapted(), "other_model": other, "another": another}


def is_installed(names):
    assert same_ticket(names["other_model"], names["report"].ticket)
    assert Path("ticket.png").stat().st_size > 1000


def same_ticket(model, ticket):
    return sfa_peft.ticket_of(model).overlap(ticket) == 1


def is_extracted(names):
    assert "relative error" in str(names["extraction"])
    assert same(names["model"], PeftModel.from_pretrained(tiny.swin(), "adapter"))


SNIPPETS = {
    "README.md": Page(pages.names_of_readme, after={"use-it": loads_alone}),
    "docs/architectures.md": Page(
        lambda: {"SFAConfig": SFAConfig},
        after={"your-own-blocks": finds_the_pvt, "your-own-blocks-2": finds_the_modules},
    ),
    "docs/choosing.md": Page(of_choosing, after={"learning-rates": has_three_rates, "with-trainer": trains}),
    "docs/compatibility.md": Page(
        of_compatibility, after={"dinov2-before-transformers-518-and-after": loads_the_older_one}
    ),
    "docs/concepts.md": Page(lambda: {"SFAConfig": SFAConfig}, after={"how-sfa-works": has_the_defaults}),
    "docs/deploying.md": Page(
        dict,
        again=of_deploying,
        after={
            "merged-a-plain-model-of-transformers-2": is_the_same("merged"),
            "merged-a-plain-model-of-transformers-3": is_that_of_the_folder,
            "dinov2": is_the_same("merged"),
            "export-onnx-torchexport-torchscript": is_the_same("logits"),
        },
    ),
    "docs/performance.md": Page(of_performance, after={"many-tasks-one-trunk": shares}),
    "docs/saving.md": Page(
        of_saving,
        again=lambda: {"base": tiny.swin()},
        after={
            "saving-sharing-inspecting": is_saved,
            "saving-sharing-inspecting-2": is_on_the_hub,
            "an-adapter-that-stands-alone": stands_alone,
            "an-adapter-that-stands-alone-2": names_the_backbone,
            "the-right-base": refuses_another_base,
            "the-model-card": is_in_the_card,
        },
    ),
    "docs/tickets.md": Page(
        of_tickets, after={"tickets": is_installed, "an-adapter-out-of-a-fine-tuned-model": is_extracted}
    ),
}


def test_every_page_with_snippets_is_run():
    assert set(SNIPPETS) == {page for page in PAGES if pages.snippets(page, "python")}


def test_what_is_not_run_and_what_is_checked_is_there():
    names = {snippet.name for page in PAGES for snippet in pages.snippets(page, "python")}
    assert NOT_RUN.keys() <= names
    assert {f"{page}#{anchor}" for page, run in SNIPPETS.items() for anchor in run.after} <= names


@pytest.mark.parametrize("page", SNIPPETS)
def test_the_snippets_of_a_page_run_in_order(page, pictures):
    given = SNIPPETS[page]
    run = [snippet for snippet in pages.snippets(page, "python") if snippet.name not in NOT_RUN]
    names = given.names() if run else {}
    for snippet in run:
        names |= given.again()
        text = snippet.text
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        snippet._replace(text=text).run(names)
        given.after.get(snippet.name.partition("#")[2], lambda names: None)(names)


class ParsedError(Exception):
    """Ends a program when it has parsed its flags."""


def check_flags(run, words, monkeypatch):
    """Start a program that ends when it has taken its flags. It says on stderr which of them it does not take."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse_and_end(parser, *args, **kwargs):
        raise ParsedError(parse_args(parser, *args, **kwargs))

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_end)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(ParsedError):
        run()


def check_script(words, monkeypatch):
    path = ROOT / words[0]
    assert path.is_file()
    if words[1:] and "argparse" in path.read_text():
        monkeypatch.syspath_prepend(str(path.parent))
        check_flags(lambda: runpy.run_path(str(path), run_name="__main__"), words, monkeypatch)


def check_make(words, monkeypatch):
    makefile = (ROOT / "Makefile").read_text().replace("$(VENV)", ".venv")
    assert re.search(rf"^{re.escape(words[1])}:", makefile, re.MULTILINE)


def check_pip(words, monkeypatch):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for word in words for extra in re.findall(r"\[(\w+)\]", word)} <= set(extras)


def check_pytest(words, monkeypatch):
    architectures = {architecture.name for architecture in registry.registered_architectures()}
    names = words[words.index("-k") + 1 :] if "-k" in words else [""]
    for path in (word for word in words if word.startswith("tests/")):
        assert all(has_test(path, name) or name in architectures for name in names)


def has_test(path, name):
    """Whether a file of tests is there, and `-k name` selects something in it."""
    return any(name in found for found in re.findall(r"^(?:def|class) (\w+)", (ROOT / path).read_text(), re.MULTILINE))


PROGRAMS = {
    "sfa-peft": lambda words, monkeypatch: check_flags(sfa_peft_command, words, monkeypatch),
    "make": check_make,
    "pip": check_pip,
    "pytest": check_pytest,
    "source": lambda words, monkeypatch: None,
}
BEFORE_A_PROGRAM = {"accelerate", "launch", "python", "-m"}
MORE_PAGES = [*PAGES, "CONTRIBUTING.md", "benchmarks/NOTES.md"]


@pytest.mark.parametrize("command", dict.fromkeys(shlex.join(c) for page in MORE_PAGES for c in pages.commands(page)))
def test_a_command_can_be_given(command, monkeypatch):
    words = list(itertools.dropwhile(BEFORE_A_PROGRAM.__contains__, shlex.split(command)))
    check = check_script if words[0].endswith(".py") else PROGRAMS[words[0]]
    check(words, monkeypatch)


def test_the_tests_that_a_page_names_are_there():
    text = (ROOT / "docs/peft-features.md").read_text()
    named = re.findall(
        r"(test_\w+)((?:,? `[^`]+`)*)(?=[ ,]|$)", "\n".join(re.findall(r"\|([^|]*)\|$", text, re.MULTILINE))
    )
    assert len(named) > 50
    for file, names in named:
        for name in re.findall(r"`([^`]+)`", names) or [""]:
            assert has_test(f"tests/{file}.py", name), (file, name)


@pytest.mark.parametrize("page", MORE_PAGES)
def test_what_a_page_links_to_is_there(page):
    """`mkdocs build --strict` checks the anchors, and the pages of the site."""
    assert [link for link in pages.links(page) if not (ROOT / page).parent.joinpath(link).exists()] == []


def examples():
    """The docstrings of the package with an example, by module and name."""
    for path in sorted(Path(sfa_peft.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                lines = doctest.DocTestParser().get_examples(ast.get_docstring(node) or "")
                if lines:
                    yield node.name, "".join(line.source for line in lines)


EXAMPLES = dict(examples())


def test_the_examples_are_of_public_names():
    assert EXAMPLES.keys() <= set(sfa_peft.__all__)
    texts = {name: inspect.getdoc(getattr(sfa_peft, name)) for name in sfa_peft.__all__}
    assert EXAMPLES.keys() == {name for name, text in texts.items() if "Example:" in text}


def of_load_dense():
    names = pages.names_of_readme()
    model = get_peft_model(names["base"], SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    describe_adapter(model, processor=names["processor"])
    model.push_to_hub("me/street-sfa")
    return {"image": Image.new("RGB", (50, 40))}


# What the examples assume, beside the public names.
ASSUMED = {
    "Architecture": dict,
    "SFAModel": lambda: {"base": tiny.swin()},
    "criterion": lambda: {"model": adapted(), "loader": BATCHES, "search_ticket": partial(search_ticket, steps=2)},
    "extract_adapter": lambda: {"base": tiny.swin(), "finetuned": tiny.train(tiny.swin())},
    "load_dense": of_load_dense,
    "parameter_groups": lambda: of_choosing() | {"model": adapted(), "torch": torch},
    "register_architecture": dict,
    "shared_trunk": lambda: of_performance() | {"outputs": {}},
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_example_of_a_docstring_runs(name):
    names = {"sfa_peft": sfa_peft, **{public: getattr(sfa_peft, public) for public in sfa_peft.__all__}}
    exec(compile(EXAMPLES[name], name, "exec"), names | ASSUMED[name]())
