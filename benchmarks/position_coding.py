"""Coding and decoding random positions: bytes against the entropy bound and flat int32, time, and extra memory.

python benchmarks/position_coding.py --millions 100
"""

from __future__ import annotations

import argparse
import time
import tracemalloc
from math import lgamma, log

import numpy as np
import torch

from sfa_peft.checkpoint.coding import decode_positions, encode_positions

DENSITIES = (1e-4, 1e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.38, 0.45, 0.5)


def bound(units: int, count: int) -> float:
    """log2 C(units, count) in bytes."""
    return (lgamma(units + 1) - lgamma(count + 1) - lgamma(units - count + 1)) / log(2) / 8


def random_positions(count: int, density: float, seed: int) -> torch.Tensor:
    """Sorted positions with independent gaps, which is what a random ticket of that density has."""
    gaps = np.random.default_rng(seed).geometric(density, count)
    return torch.from_numpy(np.cumsum(gaps) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=100, help="Positions of the long run.")
    parser.add_argument("--density", type=float, default=0.02, help="Of the long run.")
    args = parser.parse_args()
    torch.set_num_threads(1)

    columns = ("positions", "bytes", "of bound", "int32", "code M/min", "decode M/min")
    print(f"{'density':>8} " + " ".join(f"{column:>12}" for column in columns))
    runs = [(min(1_000_000, int(50_000_000 * d)), d) for d in DENSITIES]
    for count, density in [*runs, (int(args.millions * 1e6), args.density)]:
        positions = random_positions(count, density, seed=0)
        units = int(positions[-1]) + 1
        began = time.perf_counter()
        code = encode_positions(positions)
        coded = time.perf_counter()
        again = decode_positions(code, count, units)
        decoded = time.perf_counter()
        assert torch.equal(again, positions)
        per_minute = [count / seconds * 60 / 1e6 for seconds in (coded - began, decoded - coded)]
        ratios = [size / bound(units, count) for size in (len(code), 4 * count)]
        row = (
            f"{count:,}",
            f"{len(code):,}",
            f"{ratios[0]:.4f}",
            f"{ratios[1]:.2f}",
            *(f"{m:,.0f}" for m in per_minute),
        )
        print(f"{density:>8} " + " ".join(f"{cell:>12}" for cell in row), flush=True)
    positions, units = random_positions(4_000_000, args.density, seed=0), 1 << 40
    code = encode_positions(positions)
    for name, work, result in (
        ("coding", lambda: encode_positions(positions), len(code)),
        ("decoding", lambda: decode_positions(code, len(positions), units), 8 * len(positions)),
    ):
        tracemalloc.start()
        work()
        extra = tracemalloc.get_traced_memory()[1] - result
        tracemalloc.stop()
        print(f"extra memory of {name} 4,000,000 positions: {extra / 2**20:.0f} MiB")


if __name__ == "__main__":
    main()
