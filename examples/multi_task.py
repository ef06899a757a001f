"""One frozen backbone, three tasks: segmentation, detection and depth of one image by switching SFA adapters.

    python examples/multi_task.py                                              # trains the three adapters first
    python examples/multi_task.py --runs out/object_detection-sfa out/depth_estimation-sfa --image street.jpg

`--runs` are output folders of the other examples, trained with SFA on the same backbone. The backbone is loaded once,
each adapter brings its own head. The predictions are drawn, and the memory is compared with that of whole models.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import dense  # noqa: F401 - first, since it says which packages are missing

# isort: split
import numpy as np
from accelerate import PartialState
from PIL import Image
from torch import nn

from sfa_peft import shared_trunk

from dense.arguments import parse
from dense.errors import DataError, FlagError, told
from dense.folder import DESCRIBED, RESULTS, RUN, read_json, write_json
from dense.limits import whole
from dense.pictures import save_grid
from dense.run import differing, run
from dense.samples import BadSampleError, read_picture
from dense.scenes import make_scene
from dense.switching import Switchboard, Trained
from dense.task import Task
from depth_estimation import DepthEstimation
from instance_segmentation import InstanceSegmentation
from object_detection import ObjectDetection
from semantic_segmentation import SemanticSegmentation

TASKS = {
    task.__name__: task for task in (SemanticSegmentation, InstanceSegmentation, ObjectDetection, DepthEstimation)
}
# What is trained if no runs are given, all on the embedded DINOv2 backbone.
DEFAULT = {"segmentation": SemanticSegmentation, "detection": ObjectDetection, "depth": DepthEstimation}
NUMBERS = "memory.json"  # not what a run's are called: --output_dir may be a run's folder
MIB = 1 << 20


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", type=Path, help="Folders of finished runs. Default: train three now.")
    parser.add_argument("--image", type=Path, help="Default: one of the embedded scenes.")
    parser.add_argument("--steps", type=whole(1), default=300, help="Of each training.")
    parser.add_argument("--search_steps", type=whole(0), default=60, help="Of each ticket search.")
    parser.add_argument(
        "--last_blocks", type=whole(1), help="Of each adapter: only these, so that the blocks before run once for all."
    )
    parser.add_argument("--overwrite", action="store_true", help="Train the default runs again where they are there.")
    parser.add_argument("--output_dir", type=Path, default=Path("out/multi_task"))
    return parser.parse_args(arguments)


def train_all(args: argparse.Namespace) -> list[Path]:
    """Train an adapter for each default task, unless an earlier call has done it with the same flags; the folders.

    Raises:
        FlagError: If an earlier call has done it with others; nothing is trained then.
    """
    given = ["--backbone=dinov2", f"--steps={args.steps}", f"--search_steps={args.search_steps}", "--log_with=none"]
    given += [] if args.last_blocks is None else [f"--last_blocks={args.last_blocks}"]
    runs = {args.output_dir / name: task for name, task in DEFAULT.items()}
    done = {folder for folder in runs if (folder / RESULTS).is_file() and not args.overwrite}
    for folder in done:
        check_same(folder, runs[folder], given)
    for folder, task in runs.items():
        if folder in done:
            print(f"{task.name}: an earlier call has trained an adapter into {folder}")
        else:
            print(f"\n{task.name}: training an adapter into {folder}")
            # What is replaced is what --overwrite means, or no result, but an earlier call that was stopped.
            run(task, [*given, f"--output_dir={folder}", "--overwrite"])
    return list(runs)


def check_same(folder: Path, task: type[Task], given: Sequence[str]) -> None:
    """Check that a run was trained as it would be now.

    Raises:
        FlagError: If not; names the flags that are others.
    """
    anew = "train all of them again with --overwrite, or into another --output_dir"
    recorded = read_json(folder / RUN, DESCRIBED, anew)
    others = differing(recorded["args"], parse(task, given))
    told = [f"--{name} {before} and not {now}" for name, (before, now) in others.items()]
    if recorded["task"] != task.__name__:
        told.insert(0, f"{recorded['task']} and not {task.__name__}")
    if told:
        raise FlagError(f"{folder} was trained with {', '.join(told)}: give the same flags, or {anew}")


def bytes_of(*modules: nn.Module) -> int:
    """Bytes of all parameters and buffers, each counted once, wherever it is."""
    tensors = {id(t): t for m in modules for t in (*m.parameters(), *m.buffers()) if not t.is_meta}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def main(arguments: Sequence[str] | None = None) -> None:
    args = parse_arguments(arguments)
    image = make_scene(seed=12345)["image"] if args.image is None else image_of_flag(args.image)
    device = PartialState().device
    runs = [Trained.load(folder, TASKS) for folder in dict.fromkeys(args.runs or train_all(args))]
    whole = sum(bytes_of(trained.task.build(trained.model, device).model) for trained in runs)
    switchboard = Switchboard(runs, device)
    together = bytes_of(switchboard.model)
    backbone = sum(p.numel() * p.element_size() for n, p in switchboard.model.named_parameters() if is_backbone(n))

    pictures, seconds = {"image": [np.asarray(image)]}, {}
    for trained in runs:
        switchboard.paint(trained, image)  # the first call of a model is slower
        began = time.perf_counter()
        pictures[f"{trained.task.name}\n{trained.folder}"] = [switchboard.paint(trained, image)]
        seconds[trained.folder] = time.perf_counter() - began
    args.output_dir.mkdir(parents=True, exist_ok=True)
    picture = args.output_dir / "answers.png"
    save_grid(picture, pictures, {}, f"one backbone, {len(runs)} adapters")
    for folder, own in seconds.items():
        print(f"{folder}: answered in {1000 * own:.0f} ms, with the switch")
    print(answer_together(switchboard, runs, image))
    print(
        f"in memory: one backbone of {backbone / MIB:.1f} MiB, {len(runs)} adapters and heads of "
        f"{(together - backbone) / MIB:.1f} MiB; together {together / MIB:.1f} MiB. {len(runs)} whole models: "
        f"{whole / MIB:.1f} MiB, {whole / together:.2f} times as much."
    )
    on_disk = sum((trained.folder / "adapter_model.safetensors").stat().st_size for trained in runs)
    print(f"on disk: the adapters take {on_disk / MIB:.1f} MiB, the whole models {whole / MIB:.1f} MiB")
    numbers = {"bytes_together": together, "bytes_of_backbone": backbone, "bytes_of_whole_models": whole}
    write_json(args.output_dir / NUMBERS, numbers | {"bytes_on_disk": on_disk})
    print(f"picture: {picture}")


def answer_together(switchboard: Switchboard, runs: Sequence[Trained], image: Image.Image) -> str:
    """Let all runs answer with what is before their first adapted block computed once, and say how long it takes."""
    try:
        with shared_trunk(switchboard.model) as shared:
            began = time.perf_counter()
            for trained in runs:
                switchboard.paint(trained, image)
            seconds = time.perf_counter() - began
    except ValueError as error:
        return f"every run computes the whole backbone: {error} Here: --last_blocks 4."
    return f"all together in {1000 * seconds:.0f} ms, with {len(shared)} modules that run once for all"


def image_of_flag(path: Path) -> Image.Image:
    """The image that `--image` names."""
    try:
        return read_picture(path)
    except BadSampleError as error:
        raise FlagError(f"--image {path}: {error}") from error


def is_backbone(name: str) -> bool:
    """Whether a parameter of the adapted model is the backbone's own."""
    return name.startswith("base_model.model.backbone.") and ".sfa_" not in name


if __name__ == "__main__":
    with told(DataError, FlagError):
        main()
