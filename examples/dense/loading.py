"""Batches: which samples, in which order, on which process; what was wrong with them, and how long they took.

A run draws samples from an endless list of numbered draws: the n-th draw is the same sample with the same augmentation
in every run with the same seed, whatever loads it. A run that was stopped therefore goes on by counting.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from datasets.distributed import split_dataset_by_node
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler
from tqdm.auto import tqdm

from .augmentation import Augmentation, finished, to_tensors
from .data import Rows
from .errors import DataError
from .samples import BadSampleError, Census, Problems, Sample

if TYPE_CHECKING:
    from .task import Task

# So many rows in a row that cannot be used are no accident.
MOST_BAD = 1000
WAITING = 0.25  # from this part of the time on, data is said to be the bottleneck

Draw = tuple[int, int]  # a row's index, and the number of the draw


def default_workers() -> int:
    """Half of the cores this process may use: the other half computes."""
    return max(1, len(os.sched_getaffinity(0)) // 2) if hasattr(os, "sched_getaffinity") else 1


@dataclass
class Item:
    """What a worker made of a row: None where it cannot be used, and what was wrong."""

    tensors: dict[str, torch.Tensor] | None
    sample: Sample | None
    problems: Problems


def read_item(task: Task, rows: Rows, row: dict[str, Any], index: int, keeps_sample: bool) -> Item:
    """Read a row; for evaluation the sample is kept as it is, beside its tensors."""
    where, problems = rows.where(row, index), Problems(census=Census(rows=1))

    def note(kind: str, detail: str = "") -> None:
        problems.add(kind, where, detail)

    try:
        sample = task.read(row, note)
        tensors = to_tensors(sample, task.size)
    except BadSampleError as error:
        note(error.kind, error.detail)
        return Item(None, None, problems)
    problems.census.add(sample, task.counting(sample))
    return Item(tensors, sample if keeps_sample else None, problems)


class Draws(Sampler[list[Draw]]):
    """The batches of one process: every row once in each epoch, in an order that depends on the seed alone."""

    def __init__(self, count: int, batch_size: int, seed: int, rank: int, world: int, start: int, stop: int) -> None:
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world, self.start, self.stop = rank, world, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __iter__(self) -> Iterator[list[Draw]]:
        order, of_epoch = np.empty(0, np.int64), -1
        for batch in range(self.start, self.stop):
            first = (batch * self.world + self.rank) * self.batch_size
            draws = []
            for draw in range(first, first + self.batch_size):
                epoch, place = divmod(draw, self.count)
                if epoch != of_epoch:
                    order, of_epoch = np.random.default_rng([self.seed, epoch]).permutation(self.count), epoch
                draws.append((int(order[place]), draw))
            yield draws


class TrainRows(Dataset):
    """Rows for training, by draw; one that cannot be used is replaced by the next that can."""

    def __init__(self, task: Task, rows: Rows, seed: int, augmentation: Augmentation | None) -> None:
        self.task, self.rows, self.seed, self.augmentation = task, rows, seed, augmentation

    def __getitem__(self, drawn: Draw) -> Item:
        index, draw = drawn
        problems = Problems()
        for step in range(min(len(self.rows), MOST_BAD)):
            place = (index + step) % len(self.rows)
            item = read_item(self.task, self.rows, self.rows[place], place, keeps_sample=False)
            problems.merge([item.problems])
            if item.tensors is not None:
                return Item(_augmented(item, self.augmentation, (self.seed, draw)), None, problems)
        raise DataError(f"split {self.rows.split!r} has no row that can be used: {'; '.join(problems.lines())}")


class TrainStream(IterableDataset):
    """A stream of rows for training, shuffled in a buffer, begun again at its end."""

    def __init__(
        self, task: Task, rows: Rows, seed: int, augmentation: Augmentation | None, buffer: int, rank: int, world: int
    ) -> None:
        self.task, self.rows, self.seed, self.augmentation = task, rows, seed, augmentation
        self.buffer, self.rank, self.world = buffer, rank, world

    def __iter__(self) -> Iterator[Item]:
        own = split_dataset_by_node(self.rows.rows, self.rank, self.world).shuffle(self.seed, buffer_size=self.buffer)
        worker = torch.utils.data.get_worker_info()
        draw, epoch, problems = 0, 0, Problems()
        while True:
            own.set_epoch(epoch)
            before, bad = draw, 0
            for index, row in enumerate(own):
                item = read_item(self.task, self.rows, row, index, keeps_sample=False)
                problems.merge([item.problems])
                if item.tensors is None:
                    bad += 1
                    if bad >= MOST_BAD:
                        raise DataError(f"{bad} rows in a row cannot be used: {'; '.join(problems.lines())}")
                    continue
                bad = 0
                seed = (self.seed, self.rank, worker.id if worker else 0, draw)
                yield Item(_augmented(item, self.augmentation, seed), None, problems)
                draw, problems = draw + 1, Problems()
            if draw == before:
                if problems.found:
                    raise DataError(f"no row of the stream can be used: {'; '.join(problems.lines())}")
                return  # more workers than the stream has shards
            epoch += 1


class EvalRows(Dataset):
    """One process's part of a split, in order, with the samples as they are."""

    def __init__(self, task: Task, rows: Rows, indices: range) -> None:
        self.task, self.rows, self.indices = task, rows, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, place: int) -> Item:
        index = self.indices[place]
        return read_item(self.task, self.rows, self.rows[index], index, keeps_sample=True)


class EvalStream(IterableDataset):
    """The same of a stream."""

    def __init__(self, task: Task, rows: Rows, rank: int, world: int) -> None:
        self.task, self.rows, self.rank, self.world = task, rows, rank, world

    def __iter__(self) -> Iterator[Item]:
        for index, row in enumerate(split_dataset_by_node(self.rows.rows, self.rank, self.world)):
            yield read_item(self.task, self.rows, row, index, keeps_sample=True)


def _augmented(item: Item, augmentation: Augmentation | None, seed: tuple[int, ...]) -> dict[str, torch.Tensor]:
    assert item.tensors is not None
    return finished(augmentation(item.tensors, seed) if augmentation else item.tensors)


class TrainBatches:
    """The training batches of this process, on its device: an iterable that begins anew each time.

    Args:
        task: Reads rows and makes batches of them.
        rows: The split.
        accelerator: Says which process this is.
        seed: Of the order and the augmentation.
        start: Batches that an earlier run has had already.
        stop: The batch to end before.
        problems: Told what was wrong with the rows.
    """

    def __init__(
        self,
        task: Task,
        rows: Rows,
        accelerator: Accelerator,
        seed: int,
        start: int = 0,
        stop: int = 1 << 40,
        problems: Problems | None = None,
    ) -> None:
        self.task, self.rows, self.accelerator, self.seed = task, rows, accelerator, seed
        self.start, self.stop = start, stop
        self.problems = Problems() if problems is None else problems
        self.waited = 0.0

    def __iter__(self) -> Iterator[dict[str, Any]]:
        batches = iter(self._loader())
        skipped = self.start if self.rows.is_stream else 0
        for _ in tqdm(range(skipped), desc="reading up to where the run was", disable=not skipped):
            next(batches)
        for _ in range(self.start, self.stop):
            began = time.perf_counter()
            items = next(batches, None)
            if items is None:
                return
            batch = send_to_device(self.task.batch([item.tensors for item in items]), self.accelerator.device)
            self.waited += time.perf_counter() - began
            for item in items:
                tell(self.problems, item.problems, self.rows.split)
            yield batch

    def _loader(self) -> DataLoader[Any]:
        args, rank, world = self.task.args, self.accelerator.process_index, self.accelerator.num_processes
        augmentation = None if args.no_augmentation else Augmentation(self.task.size)
        options = _options(args.num_workers)
        if self.rows.is_stream:
            stream = TrainStream(self.task, self.rows, self.seed, augmentation, args.shuffle_buffer, rank, world)
            return DataLoader(stream, batch_size=args.batch_size, drop_last=True, **options)
        drawn = Draws(len(self.rows), args.batch_size, self.seed, rank, world, self.start, self.stop)
        return DataLoader(TrainRows(self.task, self.rows, self.seed, augmentation), batch_sampler=drawn, **options)


def eval_batches(
    task: Task, rows: Rows, accelerator: Accelerator, problems: Problems
) -> Iterator[tuple[torch.Tensor, list[Sample]]]:
    """This process's part of a split: images (batch, 3, height, width) on its device, and their samples."""
    rank, world = accelerator.process_index, accelerator.num_processes
    dataset = (
        EvalStream(task, rows, rank, world) if rows.is_stream else EvalRows(task, rows, range(rank, len(rows), world))
    )
    loader = DataLoader(dataset, batch_size=task.args.eval_batch_size, **_options(task.args.num_workers))
    for items in loader:
        for item in items:
            tell(problems, item.problems, rows.split)
        good = [item for item in items if item.tensors is not None]
        if good:
            images = torch.stack([finished({"image": item.tensors["image"]})["image"] for item in good])
            yield images.to(accelerator.device), [item.sample for item in good]


def look_through(task: Task, rows: Rows, accelerator: Accelerator, most: int | None = None) -> Problems:
    """What is wrong with the rows of a split, or with so many that are evenly spaced; on all processes."""
    step = 1 if most is None else max(1, -(-len(rows) // most))
    own, indices = Problems(), range(accelerator.process_index * step, len(rows), accelerator.num_processes * step)
    loader = DataLoader(EvalRows(task, rows, indices), batch_size=16, **_options(task.args.num_workers))
    for items in tqdm(loader, desc=f"checking {rows.split}", disable=not accelerator.is_main_process):
        own.merge(item.problems for item in items)
    problems = Problems()
    problems.merge(gather_object([own]))
    return problems


def check_all(task: Task, rows: Rows, accelerator: Accelerator) -> None:
    """Read every row of a split, and stop if one has a problem.

    Raises:
        DataError: Names each kind of problem, how often it comes and in which file first. On all processes.
    """
    problems = look_through(task, rows, accelerator)
    if problems.found:
        raise DataError(
            f"split {rows.split!r} has rows that cannot be used: {'; '.join(problems.lines())}. Mend them, or leave "
            f"them out with --bad_data skip."
        )


def tell(problems: Problems, more: Problems, split: str) -> None:
    """Remember problems, and say at once what is the first of its kind."""
    for kind in more.found.keys() - problems.found.keys():
        tqdm.write(f"{split}: skipped {kind} ({more.first(kind)}); more of the kind are only counted")
    problems.merge([more])


def _options(workers: int) -> dict[str, Any]:
    # A generator of its own: otherwise a loader takes its seed from the random state that dropout draws from.
    return {
        "num_workers": workers,
        "collate_fn": list,
        "generator": torch.Generator(),
        "prefetch_factor": 2 if workers else None,
    }


class Waiting:
    """Watches which part of the time training waits for data, and says so when it is the bottleneck."""

    def __init__(self, batches: TrainBatches) -> None:
        self.batches = batches
        self.seconds = self.waited = 0.0
        self.calls = 0
        self.said = False

    def part(self, seconds: float) -> float:
        """The part of the time since the last call that was spent waiting for data.

        Args:
            seconds: Spent training so far.
        """
        part = (self.batches.waited - self.waited) / max(seconds - self.seconds, 1e-9)
        self.seconds, self.waited = seconds, self.batches.waited
        self.calls += 1
        if part > WAITING and not self.said and self.calls > 1:  # at first, workers are still starting
            self.said = True
            workers = self.batches.task.args.num_workers
            tqdm.write(
                f"data loading is the bottleneck: training waited for it {part:.0%} of the time. Raise --num_workers "
                f"(now {workers}; {os.cpu_count()} cores), or make the dataset's images smaller."
            )
        return min(part, 1.0)


def rows_to_show(rows: Rows, count: int) -> Iterator[tuple[int, dict[str, Any]]]:
    """Rows for pictures, with their places: so many that are evenly spaced, then others in case some are bad."""
    if rows.is_stream:
        yield from enumerate(islice(rows, MOST_BAD))
        return
    spaced = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int).tolist()
    others = (place for place in range(len(rows)) if place not in spaced)
    for place in islice((*spaced, *others), MOST_BAD):
        yield place, rows[place]
