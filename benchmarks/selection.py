"""Exact selection of the top k among hundreds of millions of scores: time and memory beside one plain read of them.

The scores are made block by block from a seed when they are asked for, as a model's parameters would give them, so
that the machine does not have to hold them; making a block is not counted. The plain read takes the maximum of every
block. Ways that the selection could be done otherwise are measured on fewer scores: a sort of all at once, and a
Python list of them, as the published code of LT-SFT builds it.

    python benchmarks/selection.py --millions 200 1100
"""

from __future__ import annotations

import argparse
import heapq
import resource
import statistics
import time
import tracemalloc
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sfa_peft.ticket.selection import top_k

BLOCK = 4_000_000


class Scores:
    """Blocks of normally distributed scores, cut out of one block at shifting places; counts the time to make them."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.source = torch.randn(BLOCK + 100_003, generator=torch.Generator().manual_seed(0)).abs()
        self.making = 0.0

    def __call__(self) -> Iterator[tuple[str, Tensor]]:
        for i, start in enumerate(range(0, self.count, BLOCK)):
            began = time.perf_counter()
            shift = i * 7919 % 100_003
            block = self.source[shift : shift + min(BLOCK, self.count - start)] * (1 + 0.001 * (i % 97))
            self.making += time.perf_counter() - began
            yield f"p{i}", block

    def timed(self, work: Callable[[], object]) -> float:
        """Seconds of `work` without making the scores."""
        self.making = 0.0
        began = time.perf_counter()
        work()
        return time.perf_counter() - began - self.making


def peak_mb() -> float:
    """The process's peak resident memory, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=(200, 1100))
    parser.add_argument("--density", type=float, default=0.02)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="Threads of torch; by default as it chooses.")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)

    top_k(Scores(BLOCK), 1000)  # warm up
    print(f"{'scores':>14} {'k':>12} {'read s':>8} {'select s':>9} {'ratio':>6} {'extra MB':>9} {'positions MB':>13}")
    for millions in sorted(args.millions):
        measure(Scores(millions * 1_000_000), args.density, args.repeats)
    others(Scores(20_000_000), args.density)


def measure(scores: Scores, density: float, repeats: int) -> None:
    k = int(density * scores.count)
    reads = [scores.timed(lambda: [float(block.max()) for _, block in scores()]) for _ in range(repeats)]
    before = peak_mb()
    selects = [scores.timed(lambda: top_k(scores, k)) for _ in range(repeats)]
    extra = peak_mb() - before
    read, select = statistics.median(reads), statistics.median(selects)
    times = f"{read:>8.2f} {select:>9.2f} {select / read:>6.1f}"
    print(f"{scores.count:>14,} {k:>12,} {times} {extra:>9.0f} {4 * k / 1e6:>13.0f}")


def others(scores: Scores, density: float) -> None:
    """Other ways to do it, on fewer scores."""
    k = int(density * scores.count)
    ours = scores.timed(lambda: top_k(scores, k))
    print(f"\n{scores.count:,} scores, k = {k:,}: ours {ours:.2f} s")
    ways: dict[str, Callable[[], object]] = {
        "one sort of all": lambda: torch.cat([block for _, block in scores()]).sort(descending=True).indices[:k],
        "torch.topk of all": lambda: torch.cat([block for _, block in scores()]).topk(k).indices,
        "a Python list": lambda: heapq.nlargest(k, (x for _, block in scores() for x in block.tolist())),
    }
    for name, way in ways.items():
        seconds = scores.timed(way)
        print(f"  {name:<18} {seconds:>7.2f} s, {seconds / ours:.1f} times ours")
    tracemalloc.start()
    kept = next(iter(scores()))[1].tolist()
    print(f"  a Python list takes {tracemalloc.get_traced_memory()[0] / len(kept):.0f} bytes for each score")


if __name__ == "__main__":
    main()
