"""Load many damaged adapters: each has to be refused with one kind of error, leaving the model as it was.

    python benchmarks/fuzz_checkpoints.py --count 20000

Three kinds of damage: bytes changed in a file, fields changed in the config, and files forged as a whole, with tensors
or sizes changed and the seal made anew. A case fails if it raises anything but `CheckpointError`, leaves anything in
the model, loads other values than were saved (unless forged to), takes more than `--seconds`, or asks for more than
`--megabytes` beyond what the process has.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from sfa_peft import CheckpointError, SFAConfig
from sfa_peft.checkpoint.coding import encode_positions
from sfa_peft.checkpoint.packing import CODES
from sfa_peft.checkpoint.reader import tensors_of
from sfa_peft.checkpoint.seal import CONFIG, WEIGHTS, read
from sfa_peft.checkpoint.writer import write_adapter

ABSURD = (
    -1,
    0,
    1,
    2**31,
    2**40,
    2**63,
    1e308,
    float("nan"),
    "",
    "x" * 999,
    [],
    {},
    None,
    True,
    ["a"],
    {"a": {"b": 3}},
)


def make_base() -> nn.Module:
    torch.manual_seed(0)
    backbone = SwinConfig(
        image_size=32, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2], window_size=4,
        out_features=["stage1", "stage2"],
    )  # fmt: skip
    config = UperNetConfig(
        backbone_config=backbone, hidden_size=4, pool_scales=[1], use_auxiliary_head=False, num_labels=3
    )
    return UperNetForSemanticSegmentation(config).eval()


def save_adapter(folder: Path, **options: Any) -> dict[str, Tensor]:
    """Save an adapter with random values; give its tensors."""
    config = SFAConfig(budget=0.1, modules_to_save=["classifier"], init_weights=False, external_share=0.4, **options)
    model = get_peft_model(make_base(), config)
    model.save_pretrained(folder)
    return get_peft_model_state_dict(model)


def change_bytes(folder: Path, rng: random.Random) -> None:
    path = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    data = bytearray(path.read_bytes())
    # Half of the changes hit the beginning, where the header is.
    at = rng.randrange(min(len(data), 4000) if rng.random() < 0.5 else len(data))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.randint(1, 8)):
            data[(at + rng.randrange(64)) % len(data)] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data += rng.randbytes(rng.randint(1, 100))
    elif kind == 3:
        data[at : at + rng.randint(1, 64)] = rng.randbytes(rng.randint(1, 64))
    elif kind == 4:
        data[:8] = struct.pack("<Q", rng.choice([0, 1, len(data), 2**32, 2**63, 2**64 - 1, rng.randrange(10**6)]))
    else:
        other = rng.randrange(len(data))
        data[at : at + 16] = data[other : other + 16]
    path.write_bytes(bytes(data))


def change_config(folder: Path, rng: random.Random) -> None:
    config = json.loads((folder / CONFIG).read_text())
    for _ in range(rng.randint(1, 2)):
        target: Any = config
        while True:
            key = rng.choice(sorted(target))
            if not (isinstance(target[key], dict) and target[key] and rng.random() < 0.7):
                break
            target = target[key]
        kind = rng.randrange(4)
        if kind == 0:
            del target[key]
        elif kind == 1:
            target[key + rng.choice("axz")] = target.pop(key)
        elif kind == 2 and isinstance(target[key], int | float) and not isinstance(target[key], bool):
            target[key] = target[key] * rng.choice([-1, 0, 2, 10**9]) + rng.choice([-1, 0, 1])
        else:
            target[key] = copy.deepcopy(rng.choice(ABSURD))
        if not isinstance(config, dict) or not config:
            break
    (folder / CONFIG).write_text(json.dumps(config))


def forge(folder: Path, rng: random.Random) -> None:
    """Change tensors, or the sizes that the config tells of them, and seal the result as if it were good."""
    config = json.loads((folder / CONFIG).read_text())
    file = read(folder / WEIGHTS)
    # Packed as they are in the file, or by the parameters that they change.
    tensors = file.tensors if rng.random() < 0.4 else tensors_of(SFAConfig.from_pretrained(folder), file)
    key = rng.choice(sorted(tensors))
    t = tensors[key]
    kind = rng.randrange(9)
    if kind == 0:
        del tensors[key]
    elif kind == 1:
        tensors[key + "x"] = tensors.pop(key)
    elif kind == 2:
        tensors[key] = torch.randint(0, 256, (rng.randint(0, 60),), dtype=torch.uint8)
    elif kind == 3 and t.is_floating_point():
        t.view(-1)[rng.randrange(t.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    elif kind == 4:
        tensors[key] = t.reshape(-1)[: rng.randint(0, t.numel())].clone()
    elif kind == 5:
        tensors[key] = t.to(rng.choice([torch.float64, torch.int32, torch.int64, torch.bool, torch.complex64]))
    elif kind == 6:
        name = rng.choice(sorted(config["ticket_sizes"]))
        size = config["ticket_sizes"][name]
        config["ticket_sizes"][name] = rng.choice([0, size + 1, 2**40, 2**62, -1, size - 1])
    elif kind == 7:
        place = rng.choice(sorted(config["external_widths"]))
        module = rng.choice(sorted(config["external_widths"][place]))
        config["external_widths"][place][module] = rng.choice([0, 1, 2**20, 2**50, -3])
    else:
        codes = [k for k in tensors if k.endswith("_positions")] or [CODES]
        key = rng.choice(sorted(codes))
        count = 100 if key == CODES else len(tensors[key.removesuffix("_positions")])
        tensors[key] = encode_positions(torch.arange(count) * rng.choice([1, 7, 2**20]) + rng.choice([0, 5, 2**30]))
    config.pop("weights_digest", None)
    (folder / CONFIG).write_text(json.dumps(config))
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    if rng.random() < 0.7:
        shapes = {name: rng.choice([(16, 8), (2**40, 2**20), (), (0,)]) for name in config["ticket_sizes"]}
        with suppress(KeyError, ValueError):  # what cannot be packed or sealed stays as it is
            write_adapter(folder, tensors, config, shapes if rng.random() < 0.3 else file.shapes)


CHANGES: dict[str, Callable[[Path, random.Random], None]] = {
    "bytes": change_bytes,
    "config": change_config,
    "forged": forge,
}


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


def fuzz(count: int, seed: int, seconds: float = 10.0, progress: bool = False) -> tuple[Counter[str], list[str]]:
    """Load `count` damaged adapters; how many ended how, and what failed."""
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
            kind = rng.choice(sorted(CHANGES))
            damaged = Path(folder, "damaged")
            damaged.mkdir()
            for file in (CONFIG, WEIGHTS):
                shutil.copy(source / file, damaged / file)
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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0, help="for one case")
    parser.add_argument("--megabytes", type=int, default=500, help="beyond what the process has at the beginning")
    args = parser.parse_args()
    torch.set_num_threads(1)
    make_base()(torch.zeros(1, 3, 32, 32))  # what torch allocates once
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + args.megabytes * 2**20,) * 2)
    ends, failures = fuzz(args.count, args.seed, args.seconds, progress=True)
    for end, number in sorted(ends.items()):
        print(f"{end:<20} {number:>7,}")
    print(f"peak resident memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MB")
    print("\n".join(failures[:50]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
