"""How long `import sfa_peft` takes, against `import peft`, in new processes.

    python benchmarks/import_time.py [--runs 9] [--most 1.3]

Runs take turns, so that a busy machine slows both. Prints the medians, their ratio, and where the difference is: for
each package that `sfa_peft` loads and `peft` does not, the time of its own modules. With `--most`, the exit code is 1
if the ratio is larger.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import defaultdict
from statistics import median


def imported(statement: str) -> dict[str, int]:
    """The microseconds that each module takes by itself, from `python -X importtime`."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stderr.splitlines()
    rows = [line.removeprefix("import time:").split("|") for line in lines if line.startswith("import time:")]
    return {name.strip(): int(own) for own, _, name in rows[1:]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--most", type=float)
    args = parser.parse_args()
    statements = ("import peft", "import sfa_peft")
    for statement in statements:  # the first time, Python compiles
        imported(statement)
    runs: dict[str, list[dict[str, int]]] = {statement: [] for statement in statements}
    for _ in range(args.runs):
        for statement in statements:
            runs[statement].append(imported(statement))
    totals = {statement: [sum(run.values()) / 1e6 for run in found] for statement, found in runs.items()}
    for statement, seconds in totals.items():
        print(f"{statement:16} {median(seconds):6.3f} s  ({min(seconds):.3f} to {max(seconds):.3f})")
    ratio = median(totals["import sfa_peft"]) / median(totals["import peft"])
    print(f"ratio            {ratio:6.3f}")
    extra: dict[str, list[float]] = defaultdict(lambda: [0.0] * args.runs)
    for i, (ours, theirs) in enumerate(zip(runs["import sfa_peft"], runs["import peft"], strict=True)):
        for name in ours.keys() - theirs.keys():
            extra[name.partition(".")[0]][i] += ours[name] / 1e3
    for package, milliseconds in sorted(extra.items(), key=lambda item: -median(item[1]))[:8]:
        print(f"  {package:24} {median(milliseconds):7.1f} ms")
    return int(args.most is not None and ratio > args.most)


if __name__ == "__main__":
    sys.exit(main())
