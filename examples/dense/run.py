"""A run of a task's script: from flags to a saved adapter, pictures and a report."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration, gather_object, set_seed
from huggingface_hub import HfApi
from peft import PeftModel, get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from tqdm.auto import tqdm

from sfa_peft import Ticket, describe_adapter, install_ticket, search_ticket

from .arguments import checkpointing_interval, parse, plain, steps_of_epoch, trackers_of
from .checkpoints import Checkpoints, Progress
from .errors import DataError, FlagError, told
from .folder import (
    BEST,
    COMPARED,
    DESCRIBED,
    LOGS,
    MEASURED,
    REPORT,
    RESULTS,
    RUN,
    SEARCH,
    TICKET,
    TICKET_PICTURE,
    RunFolder,
    read_json,
    run_of,
    write_json,
)
from .loading import TrainBatches, check_all, look_through
from .methods import METHODS, Dense, Rates, adapt, is_adapter, is_head, trained_backbone_parameters
from .models import default_size, load_config
from .nano_backbone import pretrained_nano_backbone
from .report import Report, number, share_of
from .samples import Problems
from .task import Task
from .training import evaluate, fit

MOST_CHECKED = 2000  # rows of a split that are read before the training

# Flags that do not change what a run ends with, and may be others when it goes on.
FREE = {
    *("output_dir", "logging_steps", "eval_steps", "eval_batch_size", "num_workers", "log_with", "push_to_hub"),
    *("checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "overwrite", "compare"),
}


def main(task_class: type[Task]) -> None:
    """Run a task's script; what is wrong with flags or data ends it with a sentence."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # names of classes and files may be in any script
    with told(DataError, FlagError, OSError):  # of the last kind: what is not on the Hub, and why
        run(task_class, doc=sys.modules["__main__"].__doc__)


def run(task_class: type[Task], arguments: Sequence[str] | None = None, doc: str | None = None) -> dict[str, Any]:
    """Fine-tune, evaluate, save and report, as the flags say.

    Returns:
        What is written to `results.json`.

    Raises:
        DataError: If the data cannot be used.
        FlagError: If flags do not fit together, or not the model.
    """
    given = sys.argv[1:] if arguments is None else arguments
    command = shlex.join([Path(sys.argv[0]).name, *given])
    args = parse(task_class, given, doc)
    own = Run(task_class, args, command)
    if args.compare:
        own.check_folder()  # before the others are trained
        for method in args.compare:
            own.say(f"\n--compare: training with --method {method}")
            Run(task_class, peer_of(args, method), command).all(is_last=False)
        own.say(f"\ntraining with --method {args.method}")
    return own.all()


def peer_of(args: argparse.Namespace, method: str) -> argparse.Namespace:
    """The flags of a run that is to be compared: the same, as far as they are for every method."""
    folder = args.output_dir / COMPARED / method
    latest = "latest" if not args.overwrite or args.resume_from_checkpoint == "latest" else None
    of_sfa = dict.fromkeys(("external_share", "external_conv", "last_blocks"))
    own = of_sfa | {"method": method, "output_dir": folder, "compare": []}
    return argparse.Namespace(**vars(args) | own | {"resume_from_checkpoint": latest, "push_to_hub": None})


class Run:
    """One run, from flags to results.

    Args:
        task_class: The task.
        args: The flags.
        command: How the run was started, for the report.
    """

    def __init__(self, task_class: type[Task], args: argparse.Namespace, command: str) -> None:
        self.args, self.task_class, self.command = args, task_class, command
        self.folder = RunFolder(args.output_dir)
        self.trackers = trackers_of(args.log_with)
        # What a fully trained backbone does not use in a step (a mask token) would be waited for.
        handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)] if args.method == "full" else []
        self.accelerator = Accelerator(
            mixed_precision=args.mixed_precision,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            log_with=self.trackers,
            project_config=ProjectConfiguration(str(self.folder.work), logging_dir=str(self.folder.work / LOGS)),
            kwargs_handlers=handlers,
        )
        self.checkpoints = Checkpoints(self.folder.work, self.accelerator, args.checkpoints_total_limit)
        self.problems = {"train": Problems(), "validation": Problems()}
        self.doubts: dict[str, list[str]] = {}
        self.progress = Progress()

    def check_folder(self) -> bool:
        """Find out what the run begins with; whether a run that ended here is all that is wanted.

        Raises:
            FlagError: If this run would replace what the flags do not say it may, or goes on with other flags.
        """
        args = self.args
        with self.accelerator.main_process_first():
            if self.accelerator.is_main_process:
                self.folder.mend()
        latest = args.resume_from_checkpoint == "latest"
        self.goes_on = latest and self.folder.is_unfinished
        is_ended = latest and self.folder.is_finished and not (self.goes_on or args.overwrite)
        extends = is_ended and self._is_longer()
        if is_ended and not extends:
            return True
        self.resume = self._find_end() if extends else self._find_checkpoint()
        return False

    def all(self, is_last: bool = True) -> dict[str, Any]:
        """Do everything, and give the results. Nothing in the folder is touched until the flags and data fit.

        Args:
            is_last: Whether no other run comes after it in this process.
        """
        args = self.args
        if self.check_folder():
            return self._ended()
        self._load()
        self._check_data()
        self.report.read_samples()
        dense = self.base()
        self.heads, self.whole = dense.heads, dense.backbone_parameters
        flags = {name: getattr(args, name) for name in ("external_share", "external_conv")}
        fields = {name: value for name, value in flags.items() if value is not None}
        try:
            model = adapt(dense, args.method, args.budget, **fields, **last_blocks(dense, args))
        except (TypeError, ValueError) as error:
            flags["last_blocks"] = args.last_blocks
            given = "".join(f" --{name} {value}" for name, value in flags.items() if value is not None)
            raise FlagError(f"--method {args.method} --budget {args.budget}{given}: {error}") from error
        self.trained = trained_backbone_parameters(model, self.heads)
        self.report.facts |= {
            "backbone parameters": f"{self.whole:,}",
            "trained in the backbone": share_of(self.trained, self.whole),
        }
        self.say(
            f"{args.method}: trains {self.trained:,} of {self.whole:,} backbone parameters "
            f"({self.trained / self.whole:.2%}), and the head"
        )
        self._check_description(model)
        self._begin()
        if self.resume is None:
            self._evaluate(model)
            self._search(model)
        elif (self.resume / TICKET).is_file():
            install_ticket(model, Ticket.load(self.resume / TICKET))
        set_seed(args.seed, device_specific=True)
        model = fit(
            self.task,
            model,
            self.heads,
            self.train_rows,
            self.accelerator,
            rates=self._rates(),
            decay=0.01 if METHODS[args.method].trains_backbone else 0.0,
            progress=self.progress,
            problems=self.problems["train"],
            checkpoints=self.checkpoints,
            resume=self.resume,
            saves_start=self.interval is not None,
            after_step=self._after_step,
        )
        self._save(model, self.folder.work)  # first: a failure in what is measured, drawn and told must not lose it
        if METHODS[args.method].is_sfa and not (self.folder.work / "base_config.json").is_file():
            self.say(
                "the adapter does not stand alone, README.md says why: load_dense cannot load it, and predict.py and "
                "app.py need the run.json beside it"
            )
        try:
            if self.progress.step not in self.progress.scores:
                self._evaluate(model)
            self.checkpoints.save(self.progress.step)  # so that the run can be made longer
            results = self._finish(model)
        except BaseException:
            self.say(f"what was trained is in {self.folder.work}; keep a copy before you begin anew")
            raise
        if args.push_to_hub and is_adapter(model) and self.accelerator.is_main_process:
            model.push_to_hub(args.push_to_hub)
            self._push_description()
        # What is wrapped for several processes goes first, on all of them together. If it outlives the process group,
        # the group is closed at the end of each process, where one may wait for ever for another that has ended.
        self.accelerator.wait_for_everyone()
        self.accelerator.free_memory()
        if is_last:
            self.accelerator.end_training()
        return results

    def base(self) -> Dense:
        """The model as it was pretrained, with a fresh head if it has none of its own; the same each time."""
        set_seed(self.args.seed)
        return self.task.build(self.model_name, self.accelerator.device)

    def _find_checkpoint(self) -> Path | None:
        """The checkpoint to go on from.

        Raises:
            FlagError: If this run would replace what the flags do not say it may, or goes on with other flags.
        """
        wanted, folder = self.args.resume_from_checkpoint, self.folder
        if self.goes_on:
            self._check_same_run(folder.work)
            return self.checkpoints.find(wanted)
        checkpoint = None if wanted in (None, "latest") else self.checkpoints.find(wanted)
        if checkpoint is not None:
            self._check_same_run(run_of(checkpoint))
            self.goes_on = run_of(checkpoint) == folder.work.resolve()
        if not self.goes_on:
            folder.check_is_free(self.args.overwrite)
        return checkpoint

    def _is_longer(self) -> bool:
        """Whether more steps, or epochs, are wanted than the run that ended here was to have."""
        before = read_json(self.folder.path / RUN, DESCRIBED, "run it again with --overwrite")["args"]
        name = "num_epochs" if self.args.num_epochs else "steps"
        return (getattr(self.args, name) or 0) > (before.get(name) or math.inf)

    def _find_end(self) -> Path:
        """The last checkpoint of the run that ended here, to be made longer.

        Raises:
            FlagError: If there is none, or other flags are given than its own.
        """
        path = self.folder.path
        self._check_same_run(path, but={"steps", "num_epochs"})
        checkpoint = Checkpoints(path, self.accelerator, None).find("latest")
        if checkpoint is None:
            raise FlagError(
                f"--resume_from_checkpoint latest: the run in {path} has no checkpoint to go on from, as an earlier "
                f"version wrote none at the end; begin anew with --overwrite"
            )
        self.say(
            f"the run in {path} goes on from {checkpoint.name}; the learning rates are those of a run of as many "
            f"steps as are wanted now"
        )
        return checkpoint

    def _check_same_run(self, folder: Path, but: Collection[str] = ()) -> None:
        """Check that a run goes on with the flags that it was started with, as far as they decide its end."""
        path = folder / RUN
        if not path.is_file():
            return
        remedy = (
            "if the flags are those that the run was started with, delete this file, and the run goes on; otherwise "
            "begin anew with --overwrite instead of --resume_from_checkpoint"
        )
        started = read_json(path, DESCRIBED, remedy)
        if started["task"] != self.task_class.__name__:
            raise FlagError(f"--resume_from_checkpoint: the run in {folder} is one of {started['task']}")
        for name, (before, value) in differing(started["args"], self.args).items():
            if name in but:
                continue
            raise FlagError(
                f"--{name} {value}: the run in {folder} was started with {before}; go on with that, or begin anew "
                f"with --overwrite, or in another folder"
            )

    def _ended(self) -> dict[str, Any]:
        """What the run that is to go on has ended with: a job that may be killed is started until it is done."""
        path = self.folder.path
        self._check_same_run(path)
        if self.args.push_to_hub:
            raise FlagError(
                f"--push_to_hub {self.args.push_to_hub}: the run in {path} has ended; push its adapter with "
                f"`hf upload {self.args.push_to_hub} {path} --include README.md '*_config.json' "
                f"adapter_model.safetensors {TICKET_PICTURE}`"
            )
        results = read_json(path / RESULTS, MEASURED, "run it again with --overwrite")
        self.say(f"the run in {path} has ended; nothing is left to do")
        return results

    def _load(self) -> None:
        """Load the data, and a backbone's name."""
        args = self.args
        self.model_name = args.model or pretrained_nano_backbone(self.accelerator, args.backbone)
        with self.accelerator.main_process_first():
            self.task, self.train_rows, self.validation_rows = self.task_class.load(args)
        if args.image_size is None:
            args.image_size, source = default_size(args.model, load_config(args.model))
            self.say(f"--image_size {args.image_size[0]} {args.image_size[1]}: what {source} says")
        if args.num_epochs:
            args.steps = args.num_epochs * steps_of_epoch(args, self.train_rows, self.accelerator.num_processes)
            self.say(f"--num_epochs {args.num_epochs}: {args.steps} steps")
        self.interval = checkpointing_interval(args, self.train_rows, self.accelerator.num_processes)
        rows, work = self.validation_rows, self.folder.work
        self.report = Report(
            self.task, work, rows, self.accelerator, self.progress, self.problems, self.doubts, self.command
        )

    def _check_data(self) -> None:
        """Say how the data was understood, and what is wrong with files on this machine, before time is spent on them.

        Raises:
            DataError: If something is wrong, and the flags say that this is an error.
        """
        splits = {"train": self.train_rows, "validation": self.validation_rows}
        for line in (line for rows in splits.values() for line in rows.told):
            self.say(f"data: {line}")
        is_here = self.args.dataset is not None and Path(self.args.dataset).is_dir() and not self.args.streaming
        for split, rows in splits.items():
            if self.args.bad_data == "error":
                check_all(self.task, rows, self.accelerator)
            elif is_here:
                read = look_through(self.task, rows, self.accelerator, MOST_CHECKED)
                self.problems[split].found |= read.found  # so that each kind is told once
                self.doubts[split] = self.task.doubts(read.census)
                for line in (*read.lines(), *self.doubts[split]):
                    self.say(f"warning: {split}: {line}")
                if not read.census.usable:
                    raise DataError(f"no row of split {rows.split!r} can be used: {'; '.join(read.lines())}")

    def _begin(self) -> None:
        """Make the folder ready to be written to; no process looks at what was there any more."""
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            described = {"task": self.task_class.__name__, "model": self.model_name, "id2label": self.task.id2label}
            described |= {"args": plain(self.args), "photo_size": self.report.photo_size()}
            self.folder.begin(described, self.resume, self.goes_on)
        self.accelerator.wait_for_everyone()
        self.say(f"the run writes into {self.folder.work} until it is complete")
        if self.trackers:
            flags = {k: v if isinstance(v, int | float | str) else str(v) for k, v in plain(self.args).items()}
            self.accelerator.init_trackers("sfa_peft", config=flags)

    def _evaluate(self, model: nn.Module) -> None:
        """Score the model on the validation split, draw its predictions, and bring the report up to date."""
        progress, headline = self.progress, self.task.headline
        scores = evaluate(self.task, model, self.validation_rows, self.accelerator, self.problems["validation"])
        progress.scores[progress.step] = scores
        progress.add(headline, scores[headline])
        self.accelerator.log({k: v for k, v in scores.items() if isinstance(v, float)}, step=progress.step)
        self.say(f"step {progress.step}: {headline} {number(scores[headline])}")
        for split in ("validation", "train") if progress.step else ("validation",):
            self._doubt(split)
        if 0 < progress.step < self.args.steps and self.best_step == progress.step:
            self._keep_best(model)
        if self.accelerator.is_main_process:
            self._decorate("the pictures", lambda: self.report.draw(model))
            self._decorate("the report", self.report.write)

    @property
    def best_step(self) -> int | None:
        """The step with the best score, of those after the start; the first of equals. None if there is none yet."""
        headline, sign = self.task.headline, -1 if self.task.lower_is_better else 1
        own = {
            step: s[headline] for step, s in sorted(self.progress.scores.items()) if step and s[headline] is not None
        }
        finite = {step: sign * score for step, score in own.items() if math.isfinite(score)}
        return max(finite, key=lambda step: finite[step]) if finite else None

    def _keep_best(self, model: nn.Module) -> None:
        """Save what is trained now into a folder of its own, in the place of what was best before."""
        unfinished, kept = self.folder.work / f"unfinished_{BEST}", self.folder.work / BEST
        if self.accelerator.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
        self.accelerator.wait_for_everyone()
        self._save(model, unfinished)
        if self.accelerator.is_main_process:
            shutil.copy(self.folder.work / RUN, unfinished / RUN)
            shutil.rmtree(kept, ignore_errors=True)
            unfinished.rename(kept)

    def _decorate(self, what: str, act: Callable[[], Any]) -> None:
        """Do what a run can do without; if it fails, the run goes on and says so."""
        try:
            act()
        except Exception as error:
            self.say(f"warning: {what} could not be written: {error!r}")

    def _check_description(self, model: nn.Module) -> None:
        """Check before the training what the model card will say after it.

        Raises:
            FlagError: If that cannot stand in a card.
        """
        try:
            self._describe(model, {})
        except ValueError as error:
            raise FlagError(
                f"--dataset {self.args.dataset!r}, --validation_split {self.args.validation_split!r}: they are "
                f"named in the model card, and {error}"
            ) from error

    def _describe(self, model: nn.Module, scores: Mapping[str, Any]) -> None:
        if METHODS[self.args.method].is_sfa:
            metrics = {name: v for name, v in scores.items() if isinstance(v, float) and math.isfinite(v)}
            dataset = self.args.dataset or "embedded scenes"
            describe_adapter(
                model,
                dataset=dataset,
                split=self.validation_rows.split,
                metrics=metrics,
                processor=self.task.processor(),
            )

    def _push_description(self) -> None:
        """Push beside an adapter what `predict.py` needs to know; nothing of where things are on this machine."""
        own = argparse.ArgumentParser(add_help=False)
        self.task_class.add_arguments(own)
        names = {*vars(own.parse_args([])), "image_size", "method", "backbone", "budget", "seed"} - {"id2label"}
        described = read_json(self.folder.path / RUN, DESCRIBED, "push the adapter again")
        described["args"] = {name: described["args"][name] for name in sorted(names)}
        HfApi().upload_file(
            path_or_fileobj=json.dumps(described, indent=2).encode(),
            path_in_repo=RUN,
            repo_id=self.args.push_to_hub,
            commit_message="What the adapter predicts, and the flags that predict.py needs",
        )

    def _doubt(self, split: str) -> None:
        """Say what is doubtful in a split, the first time; later it is brought up to date."""
        read = Problems()
        read.merge(gather_object([self.problems[split]]))
        is_first = split not in self.doubts
        self.doubts[split] = self.task.doubts(read.census)
        for line in self.doubts[split] if is_first else ():
            self.say(f"warning: {split}: {line}")

    def _search(self, model: nn.Module) -> None:
        args = self.args
        if args.method != "sfa" or not args.search_steps or args.external_share == 1:
            return
        checkpoint = self.folder.work / SEARCH if self.interval else None
        try:
            report = search_ticket(
                model,
                TrainBatches(self.task, self.train_rows, self.accelerator, args.seed + 1),
                steps=args.search_steps,
                rewind=args.rewind,
                # The head goes on from there, and a transformer head is harmed by a rate that is not its own.
                adapter_learning_rate=self._rates().head,
                loss_fn=self.task.loss,
                accelerator=self.accelerator,
                checkpoint=checkpoint,
                checkpoint_every=max(1, min(50, args.search_steps // 4)),
                seed=args.seed,
            )
        except ValueError as error:
            if checkpoint is None or str(checkpoint) not in str(error):
                raise
            raise FlagError(f"the ticket search cannot go on: {error}") from error
        self.say(f"\n{report}\n")
        if self.accelerator.is_main_process:
            report.ticket.save(self.folder.work / TICKET)

    def _rates(self) -> Rates:
        args = self.args
        default = self.task.rates.get(args.method, METHODS[args.method].rates)
        given = {
            "backbone": args.learning_rate,
            "internal": args.internal_learning_rate,
            "head": args.head_learning_rate,
        }
        return replace(default, **{name: rate for name, rate in given.items() if rate is not None})

    def _after_step(self, model: nn.Module) -> bool:
        """Evaluate and write checkpoints when it is time; whether to stop."""
        step, args, stops = self.progress.step, self.args, False
        often = 20 if args.early_stopping else 4
        if step < args.steps and step % (args.eval_steps or math.ceil(args.steps / often)) == 0:
            self._evaluate(model)
            if args.early_stopping:
                later = [s for s in self.progress.scores if s > (self.best_step or 0)]
                stops = len(later) >= args.early_stopping
                if stops:
                    self.say(f"stopped: {len(later)} evaluations were no better than that of step {self.best_step}")
        if self.interval and step % self.interval == 0:
            self.checkpoints.save(step)
        return stops

    def _finish(self, model: nn.Module) -> dict[str, Any]:
        args, progress, task = self.args, self.progress, self.task
        before, after = progress.scores[0], progress.scores[progress.step]
        self.say(
            f"after {progress.step} steps ({progress.seconds:.0f} s): {task.headline} {number(after[task.headline])} "
            f"(before: {number(before[task.headline])})"
        )
        if METHODS[args.method].is_sfa:
            self._decorate("the scores in the model card", lambda: self._describe(model, after))
            self._save(model, self.folder.work)
        best = self._tell_best()
        sizes = self._sizes()
        if is_adapter(model):
            self._check_reloaded(model)
        for split, problems in self.problems.items():
            problems.merge(gather_object([problems]))
            for line in problems.lines():
                self.say(f"{split}: left out {line}")
        results = {
            "task": task.name,
            "method": args.method,
            "seed": args.seed,
            "trained_backbone_parameters": self.trained,
            "backbone_parameters": self.whole,
            "before": task.by_class(before),
            "after": task.by_class(after),
            "best": best,
            "curves": progress.series,
            "seconds": round(progress.seconds, 1),
            "bytes": sizes,
            "doubts": self.doubts,
            "left_out": {split: {k: len(v) for k, v in p.found.items()} for split, p in self.problems.items()},
        }
        results = _as_json(results)
        while self.accelerator.trackers:  # their files are about to be moved
            self._decorate("what a tracker holds", self.accelerator.trackers.pop().finish)
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            self.report.facts |= {f"saved, {part}": f"{count:,} bytes" for part, count in sizes.items()}
            self._decorate("the report", self.report.write)
            write_json(self.folder.work / RESULTS, results)  # last: with it, the result is complete
            self.folder.put_in_place()
            if METHODS[args.method].is_sfa:  # the code in its card loads it from where it is now
                self._decorate("the model card", lambda: model.create_or_update_model_card(str(self.folder.path)))
        self.accelerator.wait_for_everyone()
        self.say(f"report: {self.folder.path / REPORT}\nnumbers: {self.folder.path / RESULTS}")
        return results

    def _tell_best(self) -> dict[str, Any]:
        """Which step was the best, and where it is."""
        step, kept = self.best_step, self.folder.work / BEST
        if step is None or step == self.progress.step or not (kept / RUN).is_file():
            if self.accelerator.is_main_process:
                shutil.rmtree(kept, ignore_errors=True)
            return {"step": step, "folder": "." if step == self.progress.step else None}
        score, path = number(self.progress.scores[step][self.task.headline]), self.folder.path
        self.say(f"the best was step {step} ({self.task.headline} {score}): {path / BEST}; the last: {path}")
        return {"step": step, "folder": BEST}

    def _save(self, model: nn.Module, folder: Path) -> None:
        """Save the adapter, or what else was trained."""
        is_main = self.accelerator.is_main_process
        if is_adapter(model):
            model.save_pretrained(folder, is_main_process=is_main)
        if not (is_adapter(model) and model.active_peft_config.modules_to_save):
            whole = METHODS[self.args.method].trains_backbone
            tensors = {
                name.removeprefix("base_model.model."): tensor.contiguous().clone()
                for name, tensor in model.state_dict().items()
                if whole or is_head(name, self.heads)
            }
            if is_main:
                save_file(tensors, folder / ("model.safetensors" if whole else "head.safetensors"))
        self.accelerator.wait_for_everyone()

    def _sizes(self) -> dict[str, int]:
        """How many bytes the files take that were saved, by what they hold."""
        sizes: dict[str, int] = {}
        for path in sorted(self.folder.work.glob("*.safetensors")):
            if path.name not in (TICKET, SEARCH):
                sizes |= {part: sizes.get(part, 0) + count for part, count in checkpoint_bytes(path).items()}
        self.say("saved bytes: " + ", ".join(f"{part} {count:,}" for part, count in sizes.items()))
        return sizes

    def _check_reloaded(self, model: nn.Module) -> None:
        try:
            base = self.base().model
        except (FlagError, OSError) as error:  # the Hub is away, say
            self.say(f"warning: the adapter was not loaded again to check it: {error}")
            return
        loaded = PeftModel.from_pretrained(base, str(self.folder.work))
        ours, theirs = get_peft_model_state_dict(model), get_peft_model_state_dict(loaded)
        if ours.keys() != theirs.keys() or any(not torch.equal(ours[k], theirs[k].to(ours[k].device)) for k in ours):
            raise RuntimeError("the adapter that was loaded again is another than the one that was saved: a bug")
        self.say("reloaded into a fresh base model: every tensor is the same")

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            tqdm.write(text)


def last_blocks(dense: Dense, args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a config that name the last blocks of a backbone, if the flags ask for them.

    Raises:
        FlagError: If the backbone has fewer, or they are in stages.
    """
    if args.last_blocks is None:
        return {}
    config = dense.model.get_submodule(dense.backbone).config
    count = 0 if hasattr(config, "depths") else getattr(config, "num_hidden_layers", 0)
    if args.last_blocks > count:
        has = f"has {count}" if count else f"is a {config.model_type}, whose blocks have no numbers of their own"
        raise FlagError(f"--last_blocks {args.last_blocks}: the backbone {has}")
    return {"layers_to_transform": list(range(count - args.last_blocks, count))}


PARTS = (("sfa_internal.positions", "positions"), ("sfa_internal.", "internal values"), (".sfa_", "external"),
         (".lora_", "LoRA"), ("shira_", "SHiRA"), ("", "head or whole model"))  # fmt: skip


def checkpoint_bytes(path: Path) -> dict[str, int]:
    """The bytes of a saved file by what they are for."""
    sizes: dict[str, int] = {}
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - safe_open is not iterable
            tensor = file.get_tensor(key)
            part = next(part for mark, part in PARTS if mark in key)
            sizes[part] = sizes.get(part, 0) + tensor.numel() * tensor.element_size()
    total = path.stat().st_size
    return sizes | {"names and rest": total - sum(sizes.values()), "total": total}


def differing(recorded: Mapping[str, Any], args: argparse.Namespace) -> dict[str, tuple[Any, Any]]:
    """The flags that decide what a run ends with, where those recorded are others: before, and now."""
    # What is not given is worked out later: the size from the model, the steps from the epochs.
    free = FREE - ({"eval_steps"} if args.early_stopping else set())
    free |= {name for name in ("steps", "image_size") if getattr(args, name) is None}
    pairs = {name: (recorded.get(name, value), value) for name, value in plain(args).items() if name not in free}
    return {name: pair for name, pair in pairs.items() if _as_json(pair[0]) != _as_json(pair[1])}


def _as_json(value: Any) -> Any:
    """A value as JSON can hold it: scores of which nothing counts, or that are not finite, are null."""
    if isinstance(value, dict):
        return {key: _as_json(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
