"""Several tasks on one backbone, and the page, in a real browser."""

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Dinov2Model

import tiny
from sfa_peft import shared_trunk

from app import Adapters
from app import main as app
from dense.arguments import parse, plain
from dense.augmentation import finished, to_tensors
from dense.errors import FlagError
from dense.folder import write_json
from dense.nano_backbone import pretrained_nano_backbone
from dense.pictures import depth_colours, paint_depth, palette
from dense.run import run
from dense.samples import Classes, Sample
from dense.scenes import make_scene, make_scenes
from dense.switching import Switchboard, Trained
from dense.task import predictions
from multi_task import TASKS, bytes_of, parse_arguments, train_all
from multi_task import main as multi_task

EXAMPLES = Path(__file__).parent.parent / "examples"
CPU = torch.device("cpu")
HOSTILE = "<img src=http://x.invalid/y.png onerror=alert(1)>"
SMALL = {
    "segmentation": ("SemanticSegmentation", ["--head", "upernet", "--head_channels", "16"]),
    "detection": ("ObjectDetection", ["--head_channels", "32", "--queries", "10", "--query_groups", "2"]),
    "depth": ("DepthEstimation", ["--head_channels", "16"]),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Runs of three tasks, trained for a moment on one tiny DINOv2."""
    root = tmp_path_factory.mktemp("runs")
    torch.manual_seed(0)
    config = tiny.dinov2_config(num_hidden_layers=4, hidden_size=32, reshape_hidden_states=False)
    Dinov2Model(config).save_pretrained(root / "dinov2")
    for split in ("train", "validation"):
        make_scenes(6, seed=1).to_parquet(root / f"{split}.parquet")
    (root / "data").mkdir()
    for split in ("train", "validation"):
        (root / f"{split}.parquet").rename(root / "data" / f"{split}.parquet")
    names = {
        "0": "sky",
        "1": HOSTILE,
        "2": "![](http://x.invalid/y.png)",
        **{str(i): f"class {i}" for i in range(3, 9)},
    }
    (root / "data" / "id2label.json").write_text(json.dumps(names))
    for name, (task, own) in SMALL.items():
        flags = [
            "--model",
            str(root / "dinov2"),
            "--output_dir",
            str(root / name),
            "--steps",
            "8",
            "--batch_size",
            "2",
        ]
        more = ["--image_size", "48", "64", "--budget", "0.1", "--search_steps", "2", "--num_workers", "0"]
        more += ["--last_blocks", "2", *(["--compare", "head"] if name == "depth" else [])]
        run(TASKS[task], [*flags, *more, "--dataset", str(root / "data"), "--log_with", "none", *own])
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return root


def load(folders):
    return [Trained.load(folders / name, TASKS) for name in SMALL]


def same(one, other):
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(np.array_equal(one[k], other[k]) for k in one)
    return np.array_equal(one, other)


def alone(trained, image):
    """What a run's adapter predicts on a model of its own."""
    model = PeftModel.from_pretrained(trained.task.build(trained.model, CPU).model, str(trained.folder))
    pixels = finished(to_tensors(Sample(image), trained.task.size))["image"][None]
    return predictions(trained.task, model, pixels, [Sample(image)])[0]


@pytest.mark.slow
def test_one_backbone_answers_as_each_task_alone(folders):
    image = make_scene(7)["image"]
    runs = load(folders)
    board = Switchboard(runs, CPU)
    for trained in (*runs, *runs[::-1]):  # switched back and forth
        assert same(board.predict(trained, image), alone(trained, image))
    with shared_trunk(board.model) as shared:
        assert [name.rpartition(".")[2] for name in shared][:3] == ["embeddings", "0", "1"]
        for trained in (*runs, *runs[::-1]):
            assert same(board.predict(trained, image), alone(trained, image))
    (frozen,) = [
        p for n, p in board.model.named_parameters() if n.endswith("layer.3.attention.q_proj.base_layer.weight")
    ]
    assert torch.equal(frozen, Dinov2Model.from_pretrained(runs[0].model).encoder.layer[3].attention.q_proj.weight)


@pytest.mark.slow
def test_the_backbone_is_in_memory_once(folders):
    runs = load(folders)
    whole = [trained.task.build(trained.model, CPU) for trained in runs]
    backbone = bytes_of(whole[0].model.get_submodule(whole[0].backbone))
    together = bytes_of(Switchboard(runs, CPU).model)
    heads = sum(bytes_of(dense.model) for dense in whole) - 3 * backbone
    adapters = 3 * 0.1 * 2 * backbone  # values and positions
    assert backbone + heads < together < backbone + heads + adapters


@pytest.mark.slow
def test_the_script_draws_and_compares(folders, tmp_path, capsys):
    image = tmp_path / "street.png"
    Image.fromarray(np.asarray(make_scene(3)["image"])[..., 0].astype(np.uint16) * 257).save(image)  # 16-bit grey
    runs = [str(folders / name) for name in SMALL]
    multi_task(["--runs", *runs, "--image", str(image), "--output_dir", str(tmp_path / "out")])
    told = capsys.readouterr().out
    numbers = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert numbers["bytes_together"] < numbers["bytes_of_whole_models"]
    assert "3 whole models" in told
    assert "modules that run once for all" in told
    assert (tmp_path / "out" / "answers.png").stat().st_size > 5_000
    with pytest.raises(FlagError, match=r"--image .*nowhere\.png: image that cannot be read"):
        multi_task(["--image", str(tmp_path / "nowhere.png")])


@pytest.mark.slow
def test_runs_that_cannot_be_used_together_are_refused(folders, tmp_path, hub):
    with pytest.raises(
        FlagError, match=r"nor the folder of a finished run: it has no base_config.json and no run.json"
    ):
        Trained.load(tmp_path, TASKS)
    shutil.copytree(folders / "depth", tmp_path / "depth")
    described = json.loads((tmp_path / "depth" / "run.json").read_text())
    (tmp_path / "depth" / "run.json").write_text(json.dumps(described | {"model": "another"}))
    runs = [Trained.load(folder / "depth", TASKS) for folder in (folders, tmp_path)]
    with pytest.raises(FlagError, match=r"share no backbone; .*/depth on another"):
        Switchboard(runs, CPU)
    with pytest.raises(FlagError, match=r"depth was trained on cannot be loaded: --model 'another' is neither"):
        Switchboard(runs[1:], CPU)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "harm", "message"),
    [
        ("run.json", "{", r"run\.json is damaged \(.*\); train it again with --overwrite"),
        ("run.json", {"id2label": {"sky": "0"}}, r"run\.json is damaged \(a class has no number"),
        ("run.json", {"task": "Chess"}, "is a run of 'Chess', which is none of SemanticSegmentation"),
        ("results.json", "[]", r"results\.json is damaged"),
        (
            "results.json",
            {"before": {"abs_rel": "<script>"}},
            r"results\.json is damaged \(it has no 'abs_rel' before\)",
        ),
        ("adapter_model.safetensors", "cut off", "the adapter in .* cannot be loaded: .*damaged"),
    ],
)
def test_what_is_damaged_in_a_run_is_named(folders, tmp_path, name, harm, message):
    shutil.copytree(folders / "depth", tmp_path / "depth")
    path = tmp_path / "depth" / name
    if isinstance(harm, dict):
        harm = json.dumps(json.loads(path.read_text()) | harm)
    path.write_text(harm)
    with pytest.raises(FlagError, match=message):
        Switchboard([Trained.load(tmp_path / "depth", TASKS)], CPU)


def test_a_run_of_an_earlier_version_may_lack_flags(folders, tmp_path):
    shutil.copytree(folders / "depth", tmp_path / "depth")
    described = json.loads((tmp_path / "depth" / "run.json").read_text())
    del described["args"]["max_depth"]
    (tmp_path / "depth" / "run.json").write_text(json.dumps(described))
    assert Trained.load(tmp_path / "depth", TASKS).task.args.max_depth == 80


def test_default_runs_of_other_flags_are_not_taken_for_these(tmp_path, monkeypatch):
    """What was trained for one step is no result of three hundred."""
    trained = []

    def train(task, flags):
        args = parse(task, flags)
        args.output_dir.mkdir(parents=True, exist_ok=True)
        described = {"task": task.__name__, "model": "", "id2label": {}, "args": plain(args)}
        write_json(args.output_dir / "run.json", described)
        write_json(args.output_dir / "results.json", {})
        trained.append(args.output_dir.name)

    monkeypatch.setattr("multi_task.run", train)
    given = ["--output_dir", str(tmp_path), "--search_steps", "1"]
    train_all(parse_arguments([*given, "--steps", "1"]))
    train_all(parse_arguments([*given, "--steps", "1"]))
    assert trained == ["segmentation", "detection", "depth"]
    shutil.rmtree(tmp_path / "segmentation")
    with pytest.raises(FlagError, match=r"was trained with --steps 1 and not 300: give the same flags, or train all "):
        train_all(parse_arguments(given))
    assert len(trained) == 3  # not even the one that is missing
    train_all(parse_arguments([*given, "--overwrite"]))
    assert len(trained) == 6
    (tmp_path / "depth" / "run.json").write_text("{")
    with pytest.raises(FlagError, match=r"depth/run\.json is damaged .*; train all of them again with --overwrite"):
        train_all(parse_arguments(given))


@pytest.mark.parametrize(
    ("read", "flags"),
    [(parse_arguments, ["--steps", "-1"]), (parse_arguments, ["--search_steps", "-1"]), (app, ["--port", "99999"])],
)
def test_numbers_that_cannot_be_meant_are_refused_at_once(read, flags, capsys):
    with pytest.raises(SystemExit):
        read(flags)
    assert f"argument {flags[0]}: must be at " in capsys.readouterr().err


@pytest.mark.slow
def test_folders_may_have_any_name_and_the_same(folders, tmp_path):
    """Names that no module of torch may have, and two folders of one name: seeds of a run, say."""
    image = make_scene(7)["image"]
    for name in ("keys", "v1.0", "weight", "again/v1.0"):
        shutil.copytree(folders / "depth", tmp_path / name)
    runs = [Trained.load(tmp_path / name, TASKS) for name in ("keys", "v1.0", "weight", "again/v1.0")]
    board = Switchboard(runs, CPU)
    expected = alone(runs[0], image)
    assert all(same(board.predict(trained, image), expected) for trained in runs)


# What the scripts leave by default, with their own backbones and heads

BY_DEFAULT = {
    "swin": ("SemanticSegmentation", "InstanceSegmentation"),
    "dinov2": ("ObjectDetection", "DepthEstimation"),
}


@pytest.fixture(scope="module")
def default_runs(tmp_path_factory):
    """A short run of each task as it is without flags; and again of one, with another seed. By the backbone."""
    root = tmp_path_factory.mktemp("default")
    short = ["--steps=2", "--search_steps=1", "--max_train_samples=4", "--max_eval_samples=2", "--batch_size=2"]
    runs = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        for kind, tasks in BY_DEFAULT.items():
            model = pretrained_nano_backbone(PartialState(), kind, scenes=4, steps=2)
            for seed, task in enumerate((*tasks, tasks[0])):
                folder = root / f"{kind}-{seed}"
                own = [f"--model={model}", f"--output_dir={folder}", f"--seed={seed}", "--num_workers=0"]
                run(TASKS[task], [*short, *own, "--log_with=none"])
                runs.setdefault(kind, []).append(Trained.load(folder, TASKS))
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("kind", BY_DEFAULT)
def test_what_each_script_leaves_by_default_can_be_switched(default_runs, kind):
    image = make_scene(7)["image"]
    runs = default_runs[kind]
    board = Switchboard(runs, CPU)
    for trained in (*runs, *runs[::-1]):
        assert same(board.predict(trained, image), alone(trained, image))


@pytest.mark.slow
@pytest.mark.parametrize("kind", BY_DEFAULT)
def test_the_script_takes_what_each_script_leaves_by_default(default_runs, kind, capsys):
    folders = [str(trained.folder) for trained in default_runs[kind]]
    multi_task(["--runs", *folders, *folders, "--output_dir", folders[0]])  # a run's own folder, which stays a run's
    assert "3 whole models" in capsys.readouterr().out
    assert Trained.load(Path(folders[0]), TASKS).results


@pytest.mark.slow
def test_the_page_takes_what_each_script_leaves_by_default(default_runs, tmp_path):
    image = make_scene(5)["image"]
    image.save(tmp_path / "street.png")
    runs = {str(trained.folder): trained for own in default_runs.values() for trained in own}
    adapters = Adapters(list(runs), CPU)
    assert adapters.tasks == [TASKS[task].name for own in BY_DEFAULT.values() for task in own]
    for name, trained in runs.items():
        before, adapted, wrong = adapters.answer(str(tmp_path / "street.png"), name)
        assert before is None  # of a head that nobody has trained
        assert adapted.ndim == 3
        assert not wrong
        assert not adapters.before(name)
        assert "since its head was new" in adapters.words(name)
        assert adapters.legend(name).count("<li>") == len(trained.task.legend()) > 0
        assert adapters.legend(name) == legend_of(trained.task)
        results = trained.results
        part = results["trained_backbone_parameters"] / results["backbone_parameters"]
        assert f"{part:.1%} of the backbone trained" in adapters.words(name)
        assert f"{trained.task.score_words}: {results['before'][trained.task.headline]:.4f}" in adapters.words(name)


def legend_of(task):
    """The legend of a task as the page shows it."""
    adapters = Adapters([], CPU)
    adapters.predictors["run"] = SimpleNamespace(task=task)
    return adapters.legend("run")


@pytest.mark.slow
def test_the_page_shows_the_head_that_was_trained_alone(folders, tmp_path):
    """In the place of the untrained one, on the frozen backbone."""
    shutil.copytree(folders / "depth", tmp_path / "depth")
    trained, file = (
        Trained.load(tmp_path / "depth", TASKS),
        tmp_path / "depth" / "compared" / "head" / "head.safetensors",
    )
    dense, head = trained.task.build(trained.model, CPU), load_file(file)
    dense.model.load_state_dict(head, strict=False)
    dense.model.eval()
    make_scene(7)["image"].save(tmp_path / "street.png")
    name = str(tmp_path / "depth")
    adapters = Adapters([name], CPU)
    assert adapters.before(name) == "With the head alone"
    before, *_ = adapters.answer(str(tmp_path / "street.png"), name)
    image = make_scene(7)["image"]
    pixels = finished(to_tensors(Sample(image), trained.task.size))["image"][None]
    expected = trained.task.paint(
        np.asarray(image), predictions(trained.task, dense.model, pixels, [Sample(image)])[0]
    )
    assert np.abs(before.astype(int) - expected).max() <= 1
    assert "of the head alone" in adapters.words(name)
    save_file({k: t[..., :1].contiguous() for k, t in head.items()}, file)
    with pytest.raises(FlagError, match=r"head\.safetensors does not fit the model beside it"):
        Adapters([name], CPU)


def test_names_of_classes_are_text_in_the_legend():
    assert "&lt;b&gt;bold" in legend_of(TASKS["ObjectDetection"](None, Classes({0: "<b>bold</b>"})))


def test_depth_is_painted_in_the_colours_of_its_legend():
    for name, colour in depth_colours(80).items():
        painted = paint_depth(np.full((1, 1), float(name.removesuffix(" m"))), 80)[0, 0]
        assert np.allclose(painted / 255, colour, atol=1 / 255)


# The page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def page_url(folders):
    """The app in a process of its own, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = [str(folders / name) for name in SMALL]
    server = subprocess.Popen(
        [sys.executable, str(EXAMPLES / "app.py"), "--port", str(port), "--runs", *runs],
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        deadline = time.monotonic() + 90
        while True:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None, server.stdout.read()
            assert time.monotonic() < deadline, "the page did not come up"
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(10)


def pixels_of(page, element):
    """The size of the picture that is shown in an element, once it is there."""
    picture = page.locator(f"#{element} img")
    picture.wait_for(timeout=60_000)
    page.wait_for_function("e => document.querySelector(e).complete", arg=f"#{element} img")
    return picture.evaluate("e => [e.naturalWidth, e.naturalHeight]")


def assert_nothing_is_shown(page):
    """No prediction, of another image or adapter say."""
    for element in ("before", "adapted"):
        page.locator(f"#{element} img").wait_for(state="detached", timeout=30_000)


def fetched(url, content=None, kind="application/json"):
    """What the server answers: the status, and the content if it is good."""
    request = urllib.request.Request(url, data=content, headers={"Content-Type": kind} if content else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, b""


@pytest.mark.slow
def test_the_server_gives_the_pictures_that_it_shows_and_nothing_else(page_url, folders, tmp_path):
    _, config = fetched(f"{page_url}/config")
    (samples,) = [one["props"]["samples"] for one in json.loads(config)["components"] if one["type"] == "dataset"]
    example = samples[0][0]
    status, picture = fetched(f"{page_url}/gradio_api/file={example['path']}")
    assert (status, picture[:8]) == (200, b"\x89PNG\r\n\x1a\n")
    uploads = Path(example["path"]).parent
    secret = tmp_path / "secret.png"
    Image.new("RGB", (2, 2)).save(secret)
    run = folders / "depth"
    assert (run / "ticket.png").is_file()
    names = ("adapter_model.safetensors", "run.json", "results.json", "ticket.png", "pictures/before.npz")
    others = (secret, EXAMPLES / "app.py", EXAMPLES.parent / "README.md", "/etc/passwd")
    for path in map(str, (*(run / name for name in names), *others)):
        assert Path(path).is_file()
        ways = [path, path.replace("/", "%2f"), os.path.relpath(path), os.path.relpath(path, uploads)]
        ways += [f"{uploads}/{os.path.relpath(path, uploads)}", f"{uploads}/{os.path.relpath(path, uploads)}".upper()]
        ways += [f"{uploads}/" + os.path.relpath(path, uploads).replace("..", "%2e%2e"), f"file://{path}"]
        for way in ways:
            for door in ("gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/", ""):
                status, content = fetched(f"{page_url}/{door}{way.lstrip('/') if not door.endswith('=') else way}")
                assert status >= 400 or content != Path(path).read_bytes(), (door, way)
                assert status >= 400 or not door.endswith("="), (door, way)


def answered(page_url, *values):
    """What the page's server answers when the button is pressed, without a browser."""
    _, event = fetched(f"{page_url}/gradio_api/call/answer", json.dumps({"data": values}).encode())
    _, stream = fetched(f"{page_url}/gradio_api/call/answer/{json.loads(event)['event_id']}")
    kind, data = re.findall(r"event: (complete|error)\ndata: (.*)", stream.decode())[-1]
    return kind, json.loads(data)


@pytest.mark.slow
def test_the_server_reads_no_file_that_was_not_uploaded(page_url, folders, tmp_path):
    make_scene(5)["image"].save(tmp_path / "street.png")
    for path in (str(tmp_path / "street.png"), str(folders / "depth" / "ticket.png"), "../street.png"):
        for meta in ({"meta": {"_type": "gradio.FileData"}}, {}):
            kind, answer = answered(page_url, {"path": path} | meta, str(folders / "depth"))
            assert kind == "error" or answer == [None, None, "Upload an image first."]


@pytest.mark.slow
def test_the_server_says_of_each_file_why_it_cannot_be_used(page_url, folders, tmp_path):
    image, said = make_scene(5)["image"], {}
    for name, content, reason in (
        ("street.png", as_bytes(image, "PNG"), ""),
        ("print.jpg", as_bytes(image.convert("CMYK"), "JPEG"), ""),
        ("a[](x)'.png", as_bytes(image, "PNG")[:2000], " is damaged (image file is truncated)"),
        ("<b>.svg", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>", "damaged, or none of"),
        ("notes.txt", b"plain text", "damaged, or none of PNG, JPEG"),
    ):
        boundary = "of-a-form"
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        form = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        _, paths = fetched(f"{page_url}/gradio_api/upload", form, f"multipart/form-data; boundary={boundary}")
        (path,) = json.loads(paths)
        file = {"path": path, "meta": {"_type": "gradio.FileData"}}
        kind, (before, adapted, said[name]) = answered(page_url, file, str(folders / "depth"))
        assert kind == "complete"
        assert (before is None) == (adapted is None) == bool(reason)
        assert reason in said[name]
        assert "<" not in said[name]
        assert str(Path(path).parent) not in said[name]
    _, (_, _, told) = answered(page_url, file, "nowhere")
    assert told == "There is no such adapter."


def as_bytes(image, form, **options):
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
def test_a_person_uploads_an_image_and_switches_tasks(page_url, tmp_path):
    from playwright.sync_api import expect, sync_playwright

    make_scene(5)["image"].save(tmp_path / "street.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        page = browser.new_page()
        errors, asked = [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("dialog", lambda dialog: errors.append(dialog.message))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_url)
        expect(page.locator("#words")).to_contain_text("of the backbone trained", timeout=60_000)

        page.locator("#predict").click()
        expect(page.locator("#wrong")).to_contain_text("Upload an image first.", timeout=30_000)
        assert_nothing_is_shown(page)

        page.locator("#upload input[type=file]").set_input_files(tmp_path / "street.png")
        pixels_of(page, "upload")
        expect(page.locator("#wrong")).not_to_contain_text("Upload")
        page.locator("#predict").click()
        assert pixels_of(page, "adapted") == [128, 96]
        expect(page.locator("#before")).to_be_hidden()
        expect(page.locator("#words")).to_contain_text("since its head was new")
        expect(page.locator("#ticket table tbody tr")).to_have_count(2)  # the last two blocks
        sky = page.locator("#legend li", has_text="sky").locator("i")
        expect(page.locator("#legend")).to_contain_text(HOSTILE)
        colour = "rgb({:.0f}, {:.0f}, {:.0f})".format(*(255 * part for part in palette(1)[0]))
        expect(sky).to_have_css("background-color", colour)
        ticket = page.locator("#ticket table").inner_text()

        page.locator("#task input").click()
        page.get_by_role("option", name="depth estimation").click()
        expect(page.locator("#adapter input")).to_have_value(re.compile("depth$"), timeout=30_000)
        expect(page.locator("#words")).to_contain_text(
            "relative to the depth", timeout=30_000
        )  # before anything is predicted
        expect(page.locator("#legend")).to_contain_text("80 m")
        expect(page.locator("#legend")).not_to_contain_text("sky")
        expect(page.locator("#ticket table")).not_to_have_text(ticket)
        assert_nothing_is_shown(page)
        page.locator("#predict").click()
        assert pixels_of(page, "before") == pixels_of(page, "adapted") == [128, 96]
        expect(page.locator("#before")).to_contain_text("With the head alone")
        page.set_viewport_size({"width": 390, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        assert page.locator("#ticket table").evaluate("e => e.getBoundingClientRect().right") < 390

        page.locator("#upload button[aria-label='Remove Image']").click()
        assert_nothing_is_shown(page)
        page.locator("#upload input[type=file]").set_input_files(tmp_path / "broken.png")
        page.locator("#upload img").wait_for(timeout=30_000, state="attached")
        page.locator("#predict").click()
        reason = page.locator("#wrong")
        expect(reason).to_contain_text("This file cannot be used: image that cannot be read", timeout=30_000)
        expect(reason).to_contain_text("'broken.png'")  # its name, not where the server keeps it
        expect(page.get_by_text("Error", exact=True)).to_have_count(0)
        assert_nothing_is_shown(page)
        assert not errors
        assert not [url for url in asked if not url.startswith((page_url, "data:", "blob:"))]
        browser.close()
