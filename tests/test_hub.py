"""The way to the Hub and back, with the real client against a small server; and the model card."""

import itertools
import os
import re
import sys
import textwrap
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from PIL import Image
from torch import nn
from transformers import SegformerImageProcessor

import tiny
from sfa_peft import SFAConfig, Ticket, describe_adapter, search_ticket, ticket_of
from sfa_peft.hub.card import write_card
from sfa_peft.ticket.text import printable

REPO = "me/swin-nano-scenes-sfa"


@pytest.fixture(autouse=True)
def _quick_and_fresh(hub, tmp_path, monkeypatch):
    """Retries without waiting, and an empty cache."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    cache = str(tmp_path / "cache")
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        monkeypatch.setattr(huggingface_hub.constants, name, cache)


@pytest.fixture
def model():
    return tiny.train(get_peft_model(tiny.swin(), SFAConfig(budget=0.1, modules_to_save=["decode_head"])))


def same(model, name=REPO, **options):
    return torch.equal(tiny.output(PeftModel.from_pretrained(tiny.swin(), name, **options)), tiny.output(model))


def test_there_and_back(hub, model):
    info = model.push_to_hub(REPO, commit_message="My adapter")
    assert info.oid == hub.repos[REPO].branches["main"][-1]["oid"]
    assert hub.repos[REPO].branches["main"][-1]["message"] == "My adapter"
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "base_config.json", "ticket.png"}
    assert set(HfApi().list_repo_files(REPO)) == {*files, ".gitattributes"}
    assert same(model)
    assert isinstance(PeftConfig.from_pretrained(REPO), SFAConfig)


def test_a_second_push_is_one_commit_of_what_changed(hub, model):
    model.push_to_hub(REPO)
    tiny.train(model)
    model.push_to_hub(REPO)
    first, second = (c["files"] for c in hub.repos[REPO].branches["main"][-2:])
    assert len(hub.repos[REPO].branches["main"]) == 3
    assert first["adapter_model.safetensors"] != second["adapter_model.safetensors"]
    assert same(model)


def test_a_push_without_changes_makes_no_commit(hub, model):
    oid = model.push_to_hub(REPO).oid
    assert model.push_to_hub(REPO).oid == oid
    assert len(hub.repos[REPO].branches["main"]) == 2


def test_branches_revisions_and_pull_requests(hub, model):
    first = model.push_to_hub(REPO)
    old = tiny.output(model)
    tiny.train(model)
    model.push_to_hub(REPO, revision="v2")
    pull = model.push_to_hub(REPO, create_pr=True)
    assert same(model, revision="v2")
    assert same(model, revision="refs/pr/1")
    assert pull.pr_url.endswith("/discussions/1")
    for options in ({}, {"revision": first.oid}):
        again = PeftModel.from_pretrained(tiny.swin(), REPO, **options)
        assert torch.equal(tiny.output(again), old)


def test_an_adapter_in_a_subfolder(model):
    model.add_adapter("depth", SFAConfig(budget=0.05, init_weights=False))
    model.push_to_hub(REPO, selected_adapters=["depth"])
    model.set_adapter("depth")
    assert same(model, subfolder="depth")


@pytest.mark.parametrize("name", ["default", "night[1]"])
def test_what_an_earlier_push_said_of_another_base_is_deleted(hub, model, tmp_path, name):
    """In one commit, and nothing but files that a push has written. In a folder it is the same."""

    def push(base, processor=None):
        own = get_peft_model(base, SFAConfig(budget=0.1, init_weights=False), adapter_name=name)
        describe_adapter(own, dataset="scenes", processor=processor, adapter_name=name)
        own.save_pretrained(tmp_path / "folder")
        own.push_to_hub(REPO)
        place = "" if name == "default" else f"{name}/"
        found = {f.removeprefix(place) for f in HfApi().list_repo_files(REPO) if f.startswith(place)}
        files = {path.name for path in (tmp_path / "folder" / place).iterdir()}
        ours = {"base_config.json", "preprocessor_config.json"}
        assert found & ours == files & ours
        return found

    first = push(tiny.swin(), SegformerImageProcessor(size={"height": 32, "width": 32}))
    assert {"base_config.json", "preprocessor_config.json"} <= first
    HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo="preprocessor_config.json.mine", repo_id=REPO)
    assert "preprocessor_config.json" in push(tiny.swin())  # the same base, so that the user may have put it there
    commits = len(hub.repos[REPO].branches["main"])
    other = push(tiny.swin(depths=[1, 1]))
    assert "base_config.json" in other
    assert "preprocessor_config.json" not in other
    assert len(hub.repos[REPO].branches["main"]) == commits + 1
    odd = tiny.swin()
    odd.decode_head.classifier = nn.Conv2d(8, 5, 3)  # which its class does not make
    assert not {"base_config.json", "preprocessor_config.json"} & push(odd)
    assert {"preprocessor_config.json.mine", "README.md"} <= set(HfApi().list_repo_files(REPO))


def test_a_private_repository_needs_the_token(hub, model, monkeypatch):
    model.push_to_hub(REPO, private=True)
    assert hub.repos[REPO].private
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    base = tiny.swin()
    before = tiny.state(base)
    with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'") as caught:
        PeftModel.from_pretrained(base, REPO)
    assert isinstance(caught.value.__cause__ or caught.value.__context__, RepositoryNotFoundError)
    assert tiny.same_state(tiny.state(base), before)
    assert same(model, token="hf_good")
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub("me/another")
    assert model.push_to_hub("me/another", token="hf_good")


def test_what_is_not_there_is_told_and_changes_nothing(hub, model):
    base = tiny.swin()
    before = tiny.state(base)
    for name, options in (("me/nothing", {}), (REPO, {"revision": "v9"}), (REPO, {"subfolder": "depth"})):
        if options:
            model.push_to_hub(REPO)
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json'"):
            PeftModel.from_pretrained(base, name, **options)
    assert tiny.same_state(tiny.state(base), before)
    assert not hasattr(base, "peft_config")


def test_a_repository_without_safetensors_is_refused(hub, model):
    model.push_to_hub(REPO)
    files = hub.repos[REPO].branches["main"][-1]["files"]
    files["adapter_model.bin"] = files.pop("adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        PeftModel.from_pretrained(tiny.swin(), REPO)


def test_a_download_that_breaks_off_goes_on_where_it_was(hub, model):
    model.push_to_hub(REPO)
    hub.requests.clear()
    hub.faults.append(["GET", "adapter_model.safetensors", "cut", 1])
    assert same(model)
    assert hub.requests.count(f"GET /{REPO}/resolve/main/adapter_model.safetensors") == 2


@pytest.mark.parametrize("route", ["preupload", "objects/batch", "^/upload/"])
@pytest.mark.parametrize("status", [500, 502, 503, 504, "drop"])
def test_a_hub_that_is_down_for_a_moment_is_asked_again(hub, model, route, status):
    method = "PUT" if "upload/" in route else "POST"
    hub.faults.append([method, route, status, 2])
    model.push_to_hub(REPO)
    assert hub.faults[0][3] == 0
    assert len(hub.repos[REPO].branches["main"]) == 2
    assert same(model)


@pytest.mark.parametrize("status", [403, 409, 503])
def test_a_commit_that_fails_gives_its_error(hub, model, status):
    hub.faults.append(["POST", "/commit/", status, 1000])
    with pytest.raises(HfHubHTTPError, match=str(status)):
        model.push_to_hub(REPO)
    assert len(hub.repos[REPO].branches["main"]) == 1


def test_once_loaded_it_loads_without_the_hub(hub, model, monkeypatch):
    model.push_to_hub(REPO)
    assert same(model)
    hub.requests.clear()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(model)
    assert hub.requests == []


def test_auto_peft_model(hub, model, tmp_path):
    base = tiny.swin()
    base.save_pretrained(tmp_path / "base")
    own = type(base).from_pretrained(tmp_path / "base")
    tiny.train(get_peft_model(own, SFAConfig(budget=0.1))).push_to_hub(REPO)
    loaded = AutoPeftModel.from_pretrained(REPO)
    assert tiny.output(loaded).shape == tiny.output(base).shape


# The card


def card(folder):
    return ModelCard.load(folder / "README.md")


def test_the_card_says_what_the_adapter_is(hub, tmp_path, pictures):
    base = tiny.swin()
    base.save_pretrained(tmp_path / "base")
    base = type(base).from_pretrained(tmp_path / "base")
    base.name_or_path = base.config._name_or_path = "me/swin-nano"
    model = get_peft_model(base, SFAConfig(budget=0.1, modules_to_save=["decode_head"]))
    search_ticket(model, [tiny.batch()], steps=2, progress=False)
    describe_adapter(model, dataset="me/scenes", split="validation", metrics={"mean_iou": 0.4712})
    model.save_pretrained(tmp_path / "out")
    assert hub.requests == []  # saving asks nobody
    found = card(tmp_path / "out")
    assert found.data.library_name == "peft"
    assert found.data.base_model == "me/swin-nano"
    assert found.data.pipeline_tag == "image-segmentation"
    assert {"sfa", "peft", "transformers", "base_model:adapter:me/swin-nano"} <= set(found.data.tags)
    assert found.data.datasets == ["me/scenes"]
    result = found.data.eval_results[0]
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("mean_iou", 0.4712, "me/scenes")
    assert (result.task_type, result.dataset_split) == ("image-segmentation", "validation")
    ticket = ticket_of(model)
    for text in (f"{ticket.size:,} positions", "block", "0.1 of the backbone", "0.4712", "![", "ticket.png"):
        assert text in found.text
    with Image.open(tmp_path / "out" / "ticket.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 200
    found.validate()


def test_what_users_wrote_in_a_card_is_kept(hub, model):
    model.push_to_hub(REPO, tags=["street"])
    files = hub.repos[REPO].branches["main"][-1]["files"]
    text = (
        files["README.md"].decode().replace("# Selective", "Ask me first.\n\n# Selective") + "\n## My notes\n\nKeep.\n"
    )
    text = text.replace("library_name: peft", "library_name: peft\nlicense: mit\nlanguage: en")
    files["README.md"] = text.replace("- street", "- street\n- mine").encode()
    describe_adapter(model, dataset="scenes", metrics={"mean_iou": 0.5})
    model.push_to_hub(REPO)
    again = ModelCard(hub.repos[REPO].branches["main"][-1]["files"]["README.md"].decode())
    assert "Ask me first." in again.text
    assert "## My notes\n\nKeep." in again.text
    assert again.text.count("## Selective Feature Adapter") == 1
    assert "0.5" in again.text
    assert again.data.license == "mit"
    assert {"street", "mine", "sfa", "peft"} <= set(again.data.tags)
    # A push that says nothing of metrics keeps those of before.
    model.base_model.card_notes.clear()
    model.push_to_hub(REPO)
    third = ModelCard(hub.repos[REPO].branches["main"][-1]["files"]["README.md"].decode())
    assert third.data.eval_results[0].metric_value == 0.5
    assert "| mean_iou on scenes | 0.5 |" in third.text


def test_results_are_of_the_adapter_and_the_dataset_that_they_were_said_of(model, tmp_path):
    model.add_adapter("depth", SFAConfig(budget=0.05))
    describe_adapter(model, dataset="streets", metrics={"mean_iou": 0.25}, adapter_name="default")
    model.save_pretrained(tmp_path)
    assert card(tmp_path).text.count("mean_iou on streets") == 1
    describe_adapter(model, dataset="fields", metrics={"mean_iou": 0.75}, adapter_name="default")
    model.save_pretrained(tmp_path)
    found = {(r.dataset_name, r.metric_value) for r in card(tmp_path).data.eval_results}
    assert found == {("streets", 0.25), ("fields", 0.75)}
    describe_adapter(model, task="image-segmentation", adapter_name="default")
    model.save_pretrained(tmp_path)
    assert "mean_iou on fields" in card(tmp_path).text


def test_each_adapter_keeps_its_section(model, tmp_path):
    model.add_adapter("depth", SFAConfig(budget=0.05))
    model.save_pretrained(tmp_path)
    assert card(tmp_path).text.count("## Selective Feature Adapter") == 2
    model.save_pretrained(tmp_path, selected_adapters=["depth"])
    assert card(tmp_path).text.count("## Selective Feature Adapter") == 2
    model.save_pretrained(tmp_path)
    assert card(tmp_path).text.count("## Selective Feature Adapter") == 2


def test_only_the_main_process_pushes(hub, model):
    assert model.push_to_hub(REPO, is_main_process=False) is None
    assert not hub.repos


@pytest.mark.parametrize("pushed", [True, False])
def test_the_snippet_works_when_pasted(hub, tmp_path, pushed):
    base = tiny.swin()
    base.save_pretrained(tmp_path / "base")
    if pushed:
        base.push_to_hub("me/swin-nano")
    own = type(base).from_pretrained(
        "me/swin-nano" if pushed else tmp_path / "base", num_labels=5, ignore_mismatched_sizes=True
    )
    model = get_peft_model(own, SFAConfig(budget=0.1, modules_to_save=["decode_head"], init_weights=False))
    if pushed:
        model.push_to_hub(REPO)
        text = hub.repos[REPO].branches["main"][-1]["files"]["README.md"].decode()
    else:
        model.save_pretrained(tmp_path / "out")
        text = (tmp_path / "out" / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    names = {}
    exec(textwrap.dedent(code), names)
    assert torch.equal(tiny.output(names["model"]), tiny.output(model))


def test_a_base_that_the_hub_does_not_have_is_not_named_there(hub, tmp_path):
    base = tiny.swin()
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(type(base).from_pretrained(tmp_path / "base"), SFAConfig(budget=0.1))
    with pytest.warns(UserWarning, match="a folder that others do not have"):
        model.push_to_hub(REPO)
    text = hub.repos[REPO].branches["main"][-1]["files"]["README.md"].decode()
    assert str(tmp_path) not in text
    assert ModelCard(text).data.base_model is None


def test_without_matplotlib_there_is_a_card_without_a_picture(model, tmp_path, monkeypatch, pictures):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "ticket.png").exists()
    assert "ticket.png" not in (tmp_path / "README.md").read_text()


def test_what_cannot_be_saved_makes_no_repository(hub, model):
    with pytest.raises(ValueError, match="nope"):
        model.push_to_hub(REPO, selected_adapters=["nope"])
    with pytest.raises(ValueError, match="safe_serialization"):
        model.push_to_hub(REPO, safe_serialization=False)
    assert not hub.repos


def test_another_program_pushes_and_the_card_names_the_repository(model, tmp_path):
    describe_adapter(model, repo_id="me/by-trainer")
    model.save_pretrained(tmp_path)
    assert 'from_pretrained(base, "me/by-trainer")' in card(tmp_path).text
    assert str(tmp_path) not in card(tmp_path).text


def test_metrics_need_a_dataset_and_numbers(model):
    for bad in ("", " \n", 3):
        with pytest.raises(ValueError, match="dataset"):
            describe_adapter(model, dataset=bad)
    with pytest.raises(TypeError, match="finite"):
        describe_adapter(model, dataset="scenes", metrics={"mean_iou": float("nan")})
    with pytest.raises(ValueError, match="dataset"):
        describe_adapter(model, metrics={"mean_iou": 0.5})
    with pytest.raises(TypeError, match="numbers"):
        describe_adapter(model, dataset="scenes", metrics={"mean_iou": "good"})
    with pytest.raises(TypeError, match="get_peft_model"):
        describe_adapter(tiny.swin(), dataset="scenes")


def test_the_ticket_of_a_loaded_adapter(model, tmp_path):
    model.save_pretrained(tmp_path / "out")
    again = PeftModel.from_pretrained(tiny.swin(), tmp_path / "out")
    mine, loaded = ticket_of(model), ticket_of(again)
    assert mine.overlap(loaded) == 1
    loaded.save(tmp_path / "t.safetensors")
    assert Ticket.load(tmp_path / "t.safetensors").overlap(mine) == 1


# What a name or an existing card can do to it: nothing


class Body(nn.Module):
    """A model whose class and modules have any names."""

    def __init__(self, head="head"):
        super().__init__()
        self.body = nn.Linear(4, 4)
        self.add_module(head, nn.Linear(4, 2))
        self.of_head = head

    def forward(self, x):
        return getattr(self, self.of_head)(self.body(x))


def named(class_name="Body", head="head"):
    base = type(class_name, (Body,), {"__module__": "somewhere"})(head)
    config = SFAConfig(internal_density=0.5, target_modules=["body"], external_modules=[], modules_to_save=[head])
    return get_peft_model(base, config)


def tokens(text):
    """The Markdown tokens of a card, without those of the marks around sections."""
    markdown_it = pytest.importorskip("markdown_it")
    found = []
    for token in markdown_it.MarkdownIt("gfm-like", {"linkify": False}).parse(text):
        if not (token.type == "html_block" and token.content.startswith("<!-- sfa_peft: ")):
            found += [token, *(token.children or ())]
    return found


def cells(found):
    """The rows of all tables, with what a reader sees in each cell."""
    rows = []
    for before, token in itertools.pairwise(found):
        if token.type == "tr_open":
            rows.append([])
        elif before.type in ("td_open", "th_open"):
            rows[-1].append("".join(child.content for child in token.children))
    return rows


FRAGMENTS = [
    *("|", "\\|", "\\", "`", "```\n", "\n", "\r", "\r\n", "\x1b[31m", "\x00", "\x85", "\u2028", "\u202e", "\ud800"),
    *("\udcff", "-->", "<b>", "<script>alert(1)</script>", "![x](https://a.example/x.png)", "[x](javascript:x)"),
    *("&lt;", "&#124;", "$\\foo$", "$$", "# ", "---", "\n---\n", "- PEFT", "### Framework versions", "*a*", "_a_"),
    *(
        "~~a~~",
        "'",
        '"',
        ": ",
        "{}",
        "[[a]]",
        "*anchor",
        "!!python/object",
        "=",
        "null",
        "1e5",
        "2024-01-01",
        " ",
        "é",
    ),
    *("漢字", "🙂", "a" * 200, "<!-- sfa_peft: end default -->"),
    "<!-- sfa_peft: begin default; what is between these lines is written anew by each save -->",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=8), min_size=1, max_size=5).map("".join)
NAMES = TEXTS.filter(str.strip)
CLASSES = TEXTS.map(lambda text: "".join(c for c in text if c != "\x00" and not "\ud800" <= c <= "\udfff") or "A")
MODULES = CLASSES.map(lambda text: re.sub(r"[\\.()\[\]{}*+?|^$]", "", text) + "_head")  # a config takes no others


@pytest.mark.slow
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(task=NAMES, dataset=NAMES, split=NAMES, metric=NAMES, class_name=CLASSES, head=MODULES)
def test_no_name_breaks_a_card(tmp_path_factory, task, dataset, split, metric, class_name, head):
    folder = tmp_path_factory.mktemp("named")
    model = named(class_name, head)
    describe_adapter(model, task=task, dataset=dataset, split=split, metrics={metric: 0.5})
    model.save_pretrained(folder)
    first = (folder / "README.md").read_bytes()
    model.save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == first
    model.base_model.card_notes.clear()  # then the card alone knows the results
    model.save_pretrained(folder)
    assert (folder / "README.md").read_bytes() == first

    found = card(folder)
    result = found.data.eval_results[0]
    shown = {"dataset": result.dataset_name, "split": result.dataset_split, "metric": result.metric_type}
    assert all(text.isprintable() for text in shown.values())
    assert found.data.pipeline_tag == result.task_type
    if (task + dataset + split + metric).isprintable():
        assert (task, dataset, split, metric) == (result.task_type, *shown.values())
    parsed = tokens(found.text)
    assert not {t.type for t in parsed} & {"html_block", "html_inline", "link_open", "s_open", "hr", "blockquote_open"}
    assert [t.attrs["src"] for t in parsed if t.type == "image"] == ["ticket.png"]
    assert [t.content.count("\n") for t in parsed if t.type == "fence"] == [6]
    rows = cells(parsed)
    assert {len(row) for row in rows} == {2}
    assert ["Dataset", shown["dataset"].strip()] in rows
    assert [f"{shown['metric']} on {shown['dataset']} ({shown['split']})".strip(), "0.5"] in rows
    assert ["Task", result.task_type.strip()] in rows


@pytest.mark.parametrize("dataset", ["/data/a|b", "two\nlines", "`code`", "<b>", "![x](y)", "\ud800", "\x1b[31m"])
def test_a_name_that_markdown_or_a_terminal_acts_on_loses_no_adapter(model, tmp_path, dataset):
    describe_adapter(model, dataset=dataset, metrics={dataset: 0.5})
    model.save_pretrained(tmp_path)
    assert same(model, tmp_path)
    assert ["Dataset", printable(dataset)] in cells(tokens(card(tmp_path).text))


def test_a_mark_in_a_name_does_not_end_a_section(model, tmp_path):
    describe_adapter(model, dataset="<!-- sfa_peft: end default -->", metrics={"mean_iou": 0.5})
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    for _ in range(3):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first


def test_the_snippet_of_a_folder_with_an_odd_name_works(model, tmp_path):
    folder = tmp_path / 'a "b" <!-- c --> 🙂\n```\n\\'
    model.save_pretrained(folder)
    code = next(t.content for t in tokens(card(folder).text) if t.type == "fence")
    names = {}
    exec(code.replace("base = ...", "import tiny; base = tiny.swin()"), names)
    assert torch.equal(tiny.output(names["model"]), tiny.output(model))


def test_what_cannot_be_described_is_said_at_once(model):
    for argument in ("task", "dataset", "split", "repo_id"):
        for bad in ("", " ", 5, ["a"]):
            with pytest.raises(ValueError, match=f"{argument}="):
                describe_adapter(model, **{argument: bad})
    for bad in ("a b", "a/b/c", "me/x\n", "https://x.example"):
        with pytest.raises(ValueError, match="repo_id="):
            describe_adapter(model, repo_id=bad)
    for bad in (5, [1], {"a": None}, {"a": 10**400}):
        with pytest.raises(TypeError, match="metrics="):
            describe_adapter(model, dataset="scenes", metrics=bad)
    for bad in ("", " ", 5, None):
        with pytest.raises(ValueError, match="metrics="):
            describe_adapter(model, dataset="scenes", metrics={bad: 1.0})


KEPT = {
    "nested tags": "tags: [[a]]\nlicense: mit",
    "tags of other types": "tags: [a, 5, null, {b: c}, 2024-01-01]\nlicense: mit",
    "one tag": "tags: a\nlicense: mit",
    "tags as a mapping": "tags: {a: b}\nlicense: mit",
    "odd lists": "datasets: {a: b}\nmetrics: [[x]]\nbase_model: [a, b]\nlicense: mit",
    "odd task": "pipeline_tag: [a]\nlicense: mit",
    "model-index of another type": "model-index: hello\nlicense: mit",
    "results of other types": "model-index: [{name: [a], results: [5, {dataset: [x], metrics: 3}]}, 7]\nlicense: mit",
    "values of other types": "model-index: [{name: a, results: [{task: 5, dataset: {name: 5, split: []}, metrics: "
    "[{type: a, value: good}, {type: a, value: 1}]}]}]\nlicense: mit",
    "keys of other types": "1: 2\nself: 3\nlicense: mit",
    "nothing": "",
    "a comment": "# license: mit",
}


@pytest.mark.parametrize("described", [True, False])
@pytest.mark.parametrize("front", KEPT.values(), ids=KEPT)
def test_odd_front_matter_is_kept_and_the_card_written(model, tmp_path, front, described):
    text = f"---\n{front}\n---\n# Mine\n"
    (tmp_path / "README.md").write_text(text)
    if described:
        describe_adapter(model, dataset="scenes", metrics={"mean_iou": 0.5})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert same(model, tmp_path)
    written = (tmp_path / "README.md").read_text()
    data = yaml.safe_load(written.split("---\n")[1])
    before = yaml.safe_load(front) or {}
    for key in before.keys() - {"tags", "model-index", "datasets", "metrics", "pipeline_tag"}:
        assert data[key] == before[key]
    assert {"sfa", "peft"} < set(filter(lambda tag: isinstance(tag, str), data["tags"]))
    given = before.get("tags") or []
    assert all(tag in data["tags"] for tag in (given if isinstance(given, list) else [given]) if tag is not None)
    assert "# Mine" in written
    assert "## Selective Feature Adapter" in written
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == written


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in itertools.pairwise("abcdefghij")
)
UNREADABLE = {
    "not UTF-8": (b"---\nlicense: mit\n---\n\xff\xfe", "not UTF-8"),
    "not YAML": (b"---\ntags: [a\n---\ntext", "not valid YAML"),
    "a list": (b"---\n- a\n---\ntext", "not a mapping"),
    "a bomb": (f"---\n{BOMB}\n---\ntext".encode(), "aliases"),
    "merged bomb": (f"---\n{BOMB.replace('[', '{<<: [').replace(']', ']}')}\n---\ntext".encode(), "aliases|not valid"),
    "deep": (b"---\ntags: " + b"[" * 100_000 + b"\n---\ntext", "not valid YAML"),
    "code": (b"---\na: !!python/object/apply:os.system [exit]\n---\ntext", "not valid YAML"),
    "no number": (b"---\na: !!int ''\n---\ntext", "not valid YAML"),
    "no date": (b"---\na: 2024-99-99\n---\ntext", "not valid YAML"),
    "long": (b"---\na: " + b"a" * 1_000_000 + b"\n---\ntext", "more than"),
}


@pytest.mark.parametrize(("content", "why"), UNREADABLE.values(), ids=UNREADABLE)
def test_a_card_that_cannot_be_read_stays_as_it_is_and_loses_no_adapter(model, tmp_path, content, why):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.warns(UserWarning, match="README.md is as it was") as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    assert re.search(why, str(caught[0].message))
    assert same(model, tmp_path)
    assert (tmp_path / "README.md").read_bytes() == content


def test_a_card_on_the_hub_that_cannot_be_read_stays_as_it_is(hub, model):
    model.push_to_hub(REPO)
    hub.repos[REPO].branches["main"][-1]["files"]["README.md"] = b"\xff"
    tiny.train(model)
    with pytest.warns(UserWarning, match="not UTF-8"):
        model.push_to_hub(REPO)
    assert same(model)
    assert hub.repos[REPO].branches["main"][-1]["files"]["README.md"] == b"\xff"


@pytest.mark.parametrize(
    "make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to(path)], ids=["folder", "pipe", "loop"]
)
def test_a_card_that_is_no_file_stays_as_it_is(model, tmp_path, make):
    make(tmp_path / "README.md")
    with pytest.warns(UserWarning, match="README.md is as it was, since it is not a file") as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    assert not (tmp_path / "README.md").is_file()
    assert same(model, tmp_path)


def test_a_base_whose_name_and_tags_are_not_utf8(tmp_path):
    model = named()
    base = model.get_base_model()
    base.name_or_path, base.model_tags = "/data/\udcff", ["\ud800", "mine", 5]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
        write_card(model, tmp_path, str(tmp_path), tags=["a\nb", "\udcff"])
        first = (tmp_path / "README.md").read_bytes()
        model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first
    assert card(tmp_path).data.tags == ["\\ud800", "\\udcff", "a\\nb", "mine", "peft", "sfa"]


@pytest.mark.parametrize("broken", ["begin", "end", "end begin", "begin end", "begin begin end"])
def test_a_card_of_marks_is_read_in_linear_time(model, tmp_path, broken):
    model.save_pretrained(tmp_path)
    lines = (tmp_path / "README.md").read_text().split("\n")
    marks = {word: next(line for line in lines if f"sfa_peft: {word}" in line) for word in ("begin", "end")}
    some = "".join(f"{marks[word]}\n" for word in broken.split())
    (tmp_path / "README.md").write_text(some * (1_000_000 // len(some)) + "Mine\n")
    started = time.process_time()
    model.save_pretrained(tmp_path)
    assert time.process_time() - started < 5
    first = (tmp_path / "README.md").read_text()
    assert "Mine" in first
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == first


def test_text_between_a_lost_mark_and_a_section_is_kept(model, tmp_path):
    model.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    mark = next(line for line in text.split("\n") if "sfa_peft: begin" in line)
    (tmp_path / "README.md").write_text(text.replace(mark, f"{mark}\n\nMine\n\n{mark}"))
    model.save_pretrained(tmp_path)
    assert "Mine" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("ends", ["\r\n", "\r"])
def test_line_ends_of_other_systems(model, tmp_path, ends):
    (tmp_path / "README.md").write_bytes("\ufeff---\nlicense: mit\n---\n# Mine\n\nText\n".replace("\n", ends).encode())
    model.save_pretrained(tmp_path)
    first = (tmp_path / "README.md").read_bytes()
    assert (card(tmp_path).data.license, "# Mine" in card(tmp_path).text) == ("mit", True)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == first


def test_a_picture_that_fails_loses_neither_card_nor_adapter(model, tmp_path, monkeypatch):
    def fail(ticket, path):
        raise RuntimeError("no\x1bink")

    monkeypatch.setattr("sfa_peft.hub.card.draw_ticket", fail)
    with pytest.warns(UserWarning, match=r"ticket.png is not drawn, .* RuntimeError: no\\x1bink") as caught:
        model.save_pretrained(tmp_path)
    assert len(caught) == 1
    assert same(model, tmp_path)
    assert "## Selective Feature Adapter" in card(tmp_path).text
    assert "ticket.png" not in card(tmp_path).text


def test_a_card_that_fails_loses_no_adapter(model, tmp_path, monkeypatch):
    def fail(*args, **options):
        raise RuntimeError("no ink")

    monkeypatch.setattr("sfa_peft.hub.card.parameter_counts", fail)
    with pytest.warns(UserWarning, match="RuntimeError: no ink"):
        model.save_pretrained(tmp_path)
    assert same(model, tmp_path)


def test_formulas_in_names_are_drawn_as_text(tmp_path, pictures):
    model = named("$\\foo$", "$\\foo$_head")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    assert (tmp_path / "ticket.png").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_a_save_that_is_interrupted_at_the_picture_is_complete(model, tmp_path, monkeypatch, error):
    def stop(ticket, path):
        raise error

    monkeypatch.setattr("sfa_peft.hub.card.draw_ticket", stop)
    with pytest.raises(error):
        model.save_pretrained(tmp_path)
    assert same(model, tmp_path)
