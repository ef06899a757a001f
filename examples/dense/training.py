"""The one training loop, and evaluation, for every task and every method."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import nn
from tqdm.auto import tqdm

from .checkpoints import Checkpoints, Progress, Training
from .data import Rows
from .loading import TrainBatches, Waiting, eval_batches
from .methods import Rates, optimizer_for
from .samples import Problems
from .task import Task, predictions


def fit(
    task: Task,
    model: nn.Module,
    heads: Sequence[str],
    rows: Rows,
    accelerator: Accelerator,
    *,
    rates: Rates,
    decay: float = 0.0,
    progress: Progress | None = None,
    problems: Problems | None = None,
    checkpoints: Checkpoints | None = None,
    resume: Path | None = None,
    saves_start: bool = True,
    after_step: Callable[[nn.Module], bool] = lambda model: False,
) -> nn.Module:
    """Train what is trainable with AdamW and falling rates, for the steps that the flags say.

    Args:
        task: With the flags; gives batches and the loss.
        model: The adapted model.
        heads: Names of its heads, which have a rate of their own.
        rows: To train on.
        accelerator: Says where and how.
        rates: Learning rates.
        decay: Weight decay of a fully trained backbone.
        progress: Kept up to date.
        problems: Told what was wrong with the data.
        checkpoints: Told what a checkpoint holds, so that `after_step` and the caller may write some.
        resume: A checkpoint to go on from.
        saves_start: Whether to write a checkpoint before the first step.
        after_step: Called after each step with the model; whether to stop.

    Returns:
        The model, unwrapped.

    Raises:
        RuntimeError: If the loss is not finite any more.
    """
    args = task.args
    progress = Progress() if progress is None else progress
    optimizer = optimizer_for(model, heads, rates, decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling(args.lr_scheduler, args.steps))
    wrapped, optimizer = accelerator.prepare(model, optimizer)
    if checkpoints is not None:
        checkpoints.training = Training(wrapped, optimizer, schedule, progress)
        if resume is None and saves_start:
            checkpoints.save(0)
        elif resume is not None:
            checkpoints.load(resume)
    per_step = args.gradient_accumulation_steps
    batches = TrainBatches(
        task, rows, accelerator, args.seed, progress.step * per_step, args.steps * per_step, problems
    )
    waiting = Waiting(batches)
    wrapped.train()
    with tqdm(
        total=args.steps, initial=progress.step, desc="training", disable=not accelerator.is_main_process
    ) as bar:
        began = time.perf_counter()
        for batch in batches:
            with accelerator.accumulate(wrapped):
                loss = task.loss(wrapped, batch)
                accelerator.backward(loss)
                if accelerator.sync_gradients and args.max_grad_norm:
                    accelerator.clip_grad_norm_(wrapped.parameters(), args.max_grad_norm)
                optimizer.step()
                optimizer.zero_grad()
            progress.recent.append(loss.detach())
            if not accelerator.sync_gradients:
                continue
            if not accelerator.optimizer_step_was_skipped:
                schedule.step()
            progress.step += 1
            progress.seconds += time.perf_counter() - began
            bar.update()
            if progress.step % args.logging_steps == 0:
                mean = accelerator.reduce(torch.tensor(progress.take_recent(), device=loss.device), "mean").item()
                if not math.isfinite(mean):
                    raise RuntimeError(f"the loss is {mean} at step {progress.step}: lower the learning rates")
                progress.add("loss", mean)
                bar.set_postfix(loss=f"{mean:.3f}")
                rate, part = schedule.get_last_lr()[0], waiting.part(progress.seconds)
                accelerator.log({"loss": mean, "learning_rate": rate, "waiting_for_data": part}, step=progress.step)
            if after_step(accelerator.unwrap_model(wrapped)):
                break
            began = time.perf_counter()
    return accelerator.unwrap_model(wrapped)


def falling(kind: str, steps: int) -> Callable[[int], float]:
    """The part of the learning rates that is used at each step: a warm-up, then what `--lr_scheduler` says."""
    warm_up = max(1, min(30, steps // 10))
    shapes: dict[str, Callable[[float], float]] = {
        "polynomial": lambda left: left**0.9,
        "cosine": lambda left: 0.5 - 0.5 * math.cos(math.pi * left),
        "linear": lambda left: left,
        "constant": lambda left: 1.0,
    }
    return lambda step: min(1.0, (step + 1) / warm_up) * shapes[kind](max(0.0, 1 - step / steps))


def _agree_on_buffers(model: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the main one's: in a step, each takes a batch norm's statistics from its own batch."""
    if accelerator.num_processes > 1:
        for buffer in model.buffers():
            buffer.copy_(broadcast(buffer))


def evaluate(
    task: Task, model: nn.Module, rows: Rows, accelerator: Accelerator, problems: Problems | None = None
) -> dict[str, Any]:
    """The task's scores on a split, at the annotations' own size, over all processes; they have one model then."""
    _agree_on_buffers(model, accelerator)
    metric = task.metric()
    batches = eval_batches(task, rows, accelerator, Problems() if problems is None else problems)
    own = None if rows.is_stream else -(-len(rows) // (task.args.eval_batch_size * accelerator.num_processes))
    for images, samples in tqdm(
        batches, desc="evaluating", total=own, leave=False, disable=not accelerator.is_main_process
    ):
        with accelerator.autocast():
            found = predictions(task, model, images, samples)
        metric.add_batch(predictions=found, references=[task.truth(sample) for sample in samples])
    metric.gather(accelerator)
    return metric.compute()
