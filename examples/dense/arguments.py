"""The flags that all tasks share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.tracking import get_available_trackers

from . import data
from .errors import FlagError
from .limits import above_0, at_least_0, whole
from .loading import default_workers
from .methods import METHODS
from .nano_backbone import KINDS
from .scenes import HEIGHT, WIDTH

if TYPE_CHECKING:
    from .task import Task

STEPS = 400
EMBEDDED_SIZE = (HEIGHT, WIDTH)
SCHEDULES = ("polynomial", "cosine", "linear", "constant")
LARGEST_SEED = 2**32 - 1 - (1 << 16)  # NumPy's, less the numbers of processes that are added


def parse(
    task_class: type[Task], arguments: Sequence[str] | None = None, doc: str | None = None
) -> argparse.Namespace:
    """The flags of a task's script."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("model and method")
    model.add_argument(
        "--model", help="Hub id or folder: a whole dense checkpoint, or a backbone. Default: a nano one."
    )
    model.add_argument(
        "--backbone",
        choices=tuple(KINDS),
        default=task_class.embedded_backbone,
        help=f"Which nano one, without --model. Default: {task_class.embedded_backbone}.",
    )
    model.add_argument("--method", choices=tuple(METHODS), default="sfa")
    model.add_argument(
        "--compare",
        nargs="+",
        choices=tuple(METHODS),
        default=(),
        metavar="METHOD",
        help="Train these too, under the same settings, and have all of them in one report.",
    )
    model.add_argument("--budget", type=float, default=0.05, help="Fraction of the backbone that may be trained.")
    model.add_argument("--external_share", type=float, help="Of SFA's budget, for external adapters. Default: SFA's.")
    model.add_argument(
        "--external_conv",
        type=whole(0),
        help="Size of the filters of SFA's external adapters; 0 for none: merging can fold them. Default: SFA's.",
    )
    model.add_argument(
        "--last_blocks",
        type=whole(1),
        help="Of SFA on a plain transformer: adapt only that many blocks, so that tasks can share those before.",
    )
    model.add_argument(
        "--image_size",
        type=whole(1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="What the model sees. Default: what the image processor of --model makes; 96 128 of the nano ones.",
    )
    task_class.add_arguments(parser)
    data.add_arguments(parser, {**task_class.columns, **task_class.optional_columns})
    loop = parser.add_argument_group("training")
    length = loop.add_mutually_exclusive_group()
    length.add_argument("--steps", type=whole(1), help=f"Optimizer steps. Default: {STEPS}.")
    length.add_argument("--num_epochs", type=whole(1), help="Instead of --steps: so many times through the data.")
    loop.add_argument(
        "--early_stopping",
        type=whole(1),
        metavar="EVALUATIONS",
        help="Stop when so many evaluations in a row were no better than the best one.",
    )
    loop.add_argument(
        "--lr_scheduler",
        choices=SCHEDULES,
        default=SCHEDULES[0],
        help="How the learning rates fall, after a warm-up. Default: polynomial, of power 0.9.",
    )
    loop.add_argument(
        "--search_steps", type=whole(0), default=80, help="Of the ticket search; 0 keeps the data-free one."
    )
    loop.add_argument(
        "--rewind",
        action="store_true",
        help="Start the training with the values before the search, instead of going on from its end.",
    )
    loop.add_argument("--batch_size", type=whole(1), default=8, help="Per process.")
    loop.add_argument("--eval_batch_size", type=whole(1), default=8, help="Per process.")
    loop.add_argument("--gradient_accumulation_steps", type=whole(1), default=1)
    loop.add_argument(
        "--learning_rate", type=at_least_0, help="Of what is trained in the backbone. Default: by method."
    )
    loop.add_argument(
        "--internal_learning_rate", type=at_least_0, help="Of SFA's internal values. Default: measured best."
    )
    loop.add_argument("--head_learning_rate", type=at_least_0, help="Of the head. Default: by method.")
    loop.add_argument("--max_grad_norm", type=above_0, help="Clip gradients to this norm.")
    loop.add_argument("--no_augmentation", action="store_true", help="Neither crop nor flip nor change colours.")
    loop.add_argument("--num_workers", type=whole(0), default=default_workers(), help="Processes that load data.")
    loop.add_argument(
        "--mixed_precision", choices=("no", "bf16", "fp16"), help="Default: as accelerate is configured."
    )
    loop.add_argument("--seed", type=whole(0, LARGEST_SEED), default=0)
    out = parser.add_argument_group("output")
    out.add_argument("--output_dir", type=Path, help="Default: out/ and the task and the method.")
    out.add_argument(
        "--overwrite",
        action="store_true",
        help="Begin anew where --output_dir has a run already; its result is replaced when the new one is complete.",
    )
    out.add_argument("--logging_steps", type=whole(1), default=10)
    out.add_argument(
        "--eval_steps",
        type=whole(1),
        help="Evaluate, and draw pictures, this often. Default: 4 times a run, 20 times with --early_stopping.",
    )
    out.add_argument("--checkpointing_steps", help="Write a checkpoint every so many steps, or every `epoch`.")
    out.add_argument(
        "--checkpoints_total_limit", type=whole(0), default=2, help="How many checkpoints to keep; 0 for all."
    )
    out.add_argument(
        "--resume_from_checkpoint",
        metavar="latest|FOLDER",
        help="Go on from the latest checkpoint of --output_dir (from the start if there is none), or a certain one.",
    )
    out.add_argument(
        "--log_with", default="tensorboard", help="A tracker that Accelerate knows (wandb, ...), `all` or `none`."
    )
    out.add_argument("--push_to_hub", metavar="REPO_ID", help="Push the adapter there at the end.")
    parser.set_defaults(**task_class.defaults)
    args = parser.parse_args(arguments)
    if args.image_size is None and args.model is None:
        args.image_size = EMBEDDED_SIZE
    if args.steps is None and args.num_epochs is None:
        args.steps = STEPS
    args.compare = [method for method in dict.fromkeys(args.compare) if method != args.method]
    if args.num_epochs and args.streaming:
        parser.error("--num_epochs: a stream has no known length; give --steps")
    if args.output_dir is None:
        args.output_dir = Path("out") / f"{task_class.name.replace(' ', '_')}-{args.method}"
    for name, value in vars(args).items():
        if isinstance(value, str) and value != value.encode("utf-8", "replace").decode():
            parser.error(f"--{name} {value!a} is no text in UTF-8, and could not be told in a report")
    if not 0 < args.budget < 1:
        parser.error("--budget must be a fraction between 0 and 1")
    if args.push_to_hub and METHODS[args.method].config is None:
        parser.error(f"--push_to_hub pushes adapters; --method {args.method} makes none")
    if args.bad_data == "error" and args.streaming:
        parser.error("--bad_data error reads everything before it begins, and --streaming nothing; choose one")
    return args


def trackers_of(name: str) -> str | None:
    """What Accelerate takes for `--log_with`.

    Raises:
        FlagError: If that tracker is not known, or not installed.
    """
    if name in ("none", "all"):
        return None if name == "none" else name
    available = [str(tracker) for tracker in get_available_trackers()]
    if name not in available:
        raise FlagError(
            f"--log_with {name}: no such tracker is installed; there is {available or 'none'}. Or give `none`."
        )
    return name


def checkpointing_interval(args: argparse.Namespace, rows: data.Rows, processes: int) -> int | None:
    """After how many steps a checkpoint is written; None for never.

    Raises:
        FlagError: If the flag is no number and not ``epoch``, or is ``epoch`` of a stream.
    """
    wanted = args.checkpointing_steps
    if wanted is None:
        return None
    if wanted != "epoch":
        if not (wanted.isdecimal() and int(wanted)):
            raise FlagError(f"--checkpointing_steps {wanted!r} is neither a number of steps nor `epoch`")
        return int(wanted)
    if rows.is_stream:
        raise FlagError("--checkpointing_steps epoch: a stream has no known length; give a number of steps")
    return steps_of_epoch(args, rows, processes)


def steps_of_epoch(args: argparse.Namespace, rows: data.Rows, processes: int) -> int:
    """The optimizer steps in which each row is seen once."""
    return -(-len(rows) // (args.batch_size * args.gradient_accumulation_steps * processes))


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as JSON can hold them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
