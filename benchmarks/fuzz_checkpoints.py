"""Load damaged and forged adapters: each has to be refused with a readable error, and leaves the model as it was.

    python benchmarks/fuzz_checkpoints.py                    # everything, with 500 files of each random kind
    python benchmarks/fuzz_checkpoints.py --count 20000 --kinds bytes config forged
    python benchmarks/fuzz_checkpoints.py --kinds bombs patterns --json found.json

The kinds `bytes`, `config` and `forged` are random damage: bytes changed in a file, fields changed in the config, and
files forged as a whole, with tensors or sizes changed and the seal made anew. They are loaded in one process. `race`
loads while two processes save, and `kill` loads what a killed save leaves behind. All others are written on purpose
(benchmarks/fuzz_attacks.py). Each is loaded in a process of its own, whose time and memory are measured.

The target: no file raises anything but a `CheckpointError` or a `ValueError` with a sentence, none changes the base or
another adapter, and none under 1 MB takes more than 2 s or 200 MB. Each row of the table is a kind.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from fuzz_attacks import KINDS
from fuzz_damage import CHANGES, copied, make_base, save_adapter
from fuzz_runner import Result, World, as_json, in_process, run, trim
from fuzz_saves import kill, race, swaps
from sfa_peft import CheckpointError

SAVES = ("race", "kill")
ALL = (*KINDS, *SAVES, *CHANGES)


class Hang(BaseException):
    """A case took too long."""


def run_case(base: nn.Module, good: dict[str, Tensor], folder: Path, kind: str, seconds: float) -> str:
    """Load one damaged adapter; "refused" or "loaded", or what went wrong."""
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    flags = [p.requires_grad for p in base.parameters()]

    def stop(*_: Any) -> None:
        raise Hang

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = PeftModel.from_pretrained(base, str(folder))
    except CheckpointError:
        result = "refused"
    except Hang:
        return f"took more than {seconds} s"
    except BaseException as error:
        result = f"raised {type(error).__name__}: {str(error)[:200]}"
    else:
        loaded = get_peft_model_state_dict(model)
        same = loaded.keys() == good.keys() and all(torch.equal(loaded[k], good[k]) for k in good)
        result = "loaded" if same or kind == "forged" else "loaded other values than were saved"
        model.unload()
        vars(base).pop("peft_config", None)
        for p, requires_grad in zip(base.parameters(), flags, strict=True):
            p.requires_grad_(requires_grad)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    after = base.state_dict()
    if after.keys() != before.keys() or not all(torch.equal(after[name], before[name]) for name in before):
        return f"{result}, and the model is not as it was"
    if [p.requires_grad for p in base.parameters()] != flags or hasattr(base, "peft_config"):
        return f"{result}, and the model's flags are not as they were"
    return result


def fuzz(
    count: int, seed: int, seconds: float = 10.0, progress: bool = False, kinds: Sequence[str] = tuple(CHANGES)
) -> tuple[Counter[str], list[str]]:
    """Load `count` adapters with random damage; how many ended how, and what failed."""
    ends: Counter[str] = Counter()
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        sources = []
        for name, options in (
            ("elements", {}),
            ("rows", {"internal_granularity": "row"}),
            ("columns", {"internal_granularity": "column", "values_dtype": "float16"}),
        ):
            good = save_adapter(Path(folder, name), **options)
            if options.get("values_dtype"):
                good = get_peft_model_state_dict(PeftModel.from_pretrained(make_base(), str(Path(folder, name))))
            sources.append((Path(folder, name), good))
        base = make_base()
        begin = time.perf_counter()
        for case in range(count):
            rng = random.Random(f"{seed} {case}")
            torch.manual_seed(case)
            source, good = rng.choice(sources)
            kind = rng.choice(sorted(kinds))
            damaged = copied(source, Path(folder, "damaged"))
            CHANGES[kind](damaged, rng)
            result = run_case(base, good, damaged, kind, seconds)
            shutil.rmtree(damaged)
            if result in ("refused", "loaded"):
                ends[f"{kind}: {result}"] += 1
            else:
                ends[f"{kind}: FAILED"] += 1
                failures.append(f"case {case} (seed {seed}, {kind}): {result}")
                base = make_base()
            if progress and (case + 1) % 1000 == 0:
                rate = (time.perf_counter() - begin) / (case + 1)
                print(f"{case + 1:,} cases, {len(failures)} failed, {1000 * rate:.1f} ms each", flush=True)
    return ends, failures


def attack(
    world: World, kinds: Sequence[str], seed: int, count: int, seconds: float = 10.0, match: str = ""
) -> Iterator[Result]:
    """Try the files of some kinds that were written on purpose.

    Args:
        world: Good adapters and models.
        kinds: Of `KINDS` and `SAVES`.
        seed, count: Of each kind at most `count` files are tried, chosen at random.
        seconds: How long the race takes.
        match: Only files with this text in their name.
    """
    for kind in kinds:
        if kind == "race":
            yield from swaps(world)
            yield from race(world, seconds)
        elif kind == "kill":
            yield from kill(world)
        else:
            attacks = [one for one in KINDS[kind](world, seed, count) if match in one.name]
            if len(attacks) > count:
                attacks = random.Random(f"{seed} {kind}").sample(attacks, count)
            for one in attacks:
                yield from run(world, one)


COLUMNS = ("kind", "ways", "loads", "refused", "accepted", "wrongly", "raw", "changed", "slow", "large", "MB", "s")


def row(kind: str, results: Sequence[Result]) -> list[str]:
    """One row of the table. `wrongly` are files that were accepted though they must not be."""

    def number(values: Sequence[bool]) -> str:
        return f"{sum(values):,}"

    small = [r for r in results if r.size <= 1] or results
    return [
        kind,
        f"{len({r.way for r in results})}",
        f"{len(results):,}",
        number([r.end == "refused" for r in results]),
        number([r.end == "accepted" and not r.must_refuse for r in results]),
        number([r.end == "accepted" and r.must_refuse for r in results]),
        number([r.end in ("raw", "died") for r in results]),
        number([r.changed is not None for r in results]),
        number([r.is_slow for r in results]),
        number([r.is_large for r in results]),
        f"{max((r.megabytes for r in small), default=0):.0f}",
        f"{max((r.seconds for r in small), default=0):.1f}",
    ]


def table(results: Sequence[Result]) -> str:
    """One row for each kind, and below it what was raised."""
    kinds = list(dict.fromkeys(r.kind for r in results))
    rows = [list(COLUMNS), *(row(kind, [r for r in results if r.kind == kind]) for kind in kinds)]
    widths = [max(len(r[i]) for r in rows) for i in range(len(COLUMNS))]
    lines = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(r, widths, strict=True)))
        for r in rows
    ]
    for kind in kinds:
        raised = Counter(r.error.split(":")[0] for r in results if r.kind == kind and r.end in ("raw", "died"))
        if raised:
            lines.append(f"{kind} raised " + ", ".join(f"{name} {n}" for name, n in raised.most_common()))
    return "\n".join(lines)


def _random_damage(kinds: Sequence[str], args: argparse.Namespace) -> list[str]:
    """Try random damage, print how it ended, and give what failed."""

    def run_all() -> dict[str, Any]:
        before = in_use()
        ends, failures = fuzz(args.count, args.seed, args.seconds, kinds=kinds)
        return {"end": "", "ends": ends, "failures": failures[:200], "megabytes": in_use() - before}

    found = in_process(run_all, args.count * args.seconds)
    for end, number in sorted(found.get("ends", {}).items()):
        print(f"{end:<20} {number:>7,}")
    if "failures" not in found:
        return [str(found)]
    print(f"the process grew by {found['megabytes']:.0f} MB at its largest")
    return list(found["failures"])


def in_use() -> float:
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="the most files of a kind; random kinds share it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="+", choices=ALL, default=ALL, metavar="KIND", help=f"of {', '.join(ALL)}")
    parser.add_argument("--match", default="", help="only files with this text in their name")
    parser.add_argument("--seconds", type=float, default=10.0, help="for one random case, and for the race")
    parser.add_argument("--json", metavar="FILE", help="write each result to a file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    make_base()(torch.zeros(1, 3, 32, 32))  # what torch allocates once
    failures = []
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        trim()
        for kind in args.kinds:
            if kind not in CHANGES:
                results += attack(world, [kind], args.seed, args.count, args.seconds, args.match)
                print(f"{kind}: {sum(r.kind == kind for r in results):,} loads", file=sys.stderr, flush=True)
    if results:
        print(table(results))
        failures += [str(r) for r in results if r.failure]
    if chosen := [kind for kind in args.kinds if kind in CHANGES]:
        failures += _random_damage(chosen, args)
    if args.json:
        found = {"results": as_json(results), "failures": failures}
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    print(f"{len(failures):,} failures", *failures[:100], sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
