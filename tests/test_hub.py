"""The way to the Hub and back, with the real client against a small server; and the model card."""

import sys
import textwrap

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from peft import AutoPeftModel, PeftConfig, PeftModel, get_peft_model
from PIL import Image

import tiny
from sfa_peft import SFAConfig, Ticket, describe_adapter, search_ticket, ticket_of

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
    files = {"README.md", "adapter_config.json", "adapter_model.safetensors", "ticket.png", ".gitattributes"}
    assert set(HfApi().list_repo_files(REPO)) == files
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
    for text in (f"{ticket.size:,} positions", "mlp_parallel", "0.1 of the backbone", "0.4712", "![", "ticket.png"):
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
    for bad in ("a | b", "a\nb", "", 3):
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
