"""The `sfa-peft` command: look at saved adapters, check them, fold them into their base, compare them."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from .checkpoint import CheckpointError
from .checkpoint.fingerprint import BaseMismatchWarning, Fingerprint
from .checkpoint.names import INTERNAL, POSITIONS, PREFIX, is_adapter_key, is_positions_key
from .checkpoint.packing import CODES
from .checkpoint.reader import contents_of, difference_of, tensors_of, weights_of
from .checkpoint.seal import AdapterFile, digest_of, read
from .config import SFAConfig
from .layers.adapted import sfa_layers
from .planning.base import in_module
from .ticket import Ticket, TicketReport

OK, BAD, TROUBLE = 0, 1, 2
EXTERNAL_FOLDER = "external"


class RefusedError(Exception):
    """What a command was asked for cannot be done; the text says why."""


@dataclass
class Saved:
    """A saved adapter, read and checked."""

    name: str
    config: SFAConfig
    file: AdapterFile
    size: int

    @classmethod
    def load(cls, name: str, options: dict[str, Any]) -> Saved:
        config = SFAConfig.from_pretrained(name, **options)
        weights = weights_of(name, **options)
        if weights is None:
            raise RefusedError(f"{name!r} has a config, but no weights.")
        return cls(name, config, read(weights), weights.stat().st_size)

    @property
    def bytes(self) -> dict[str, int]:
        """The file's bytes by what they are for."""
        counted: Counter[str] = Counter()
        for key, tensor in self.file.tensors.items():
            counted[_part(key)] += tensor.numel() * tensor.element_size()
        counted["names and seal"] = self.size - sum(counted.values())
        return dict(counted)

    @property
    def parameters(self) -> dict[str, int]:
        """The adapter's parameters by what they are for."""
        counted: Counter[str] = Counter()
        for key, tensor in self.file.tensors.items():
            if (part := _part(key)) != "positions":
                counted[part] += tensor.numel()
        return dict(counted)

    @property
    def adapted_heads(self) -> dict[str, dict[str, int]]:
        """What internal values, and bytes of them, lie in each of `target_heads`."""
        values = {
            key.removeprefix(PREFIX): tensor
            for key, tensor in tensors_of(self.config, self.file).items()
            if INTERNAL in key and not is_positions_key(key)
        }
        return {
            head: {
                "parameters": sum(t.numel() for name, t in values.items() if in_module(name, [head])),
                "bytes": sum(t.numel() * t.element_size() for name, t in values.items() if in_module(name, [head])),
            }
            for head in self.config.target_heads or ()
        }

    @property
    def ticket(self) -> Ticket:
        if not self.file.shapes and self.config.ticket_sizes:
            raise RefusedError(
                f"{self.name!r} was not saved by sfa_peft itself, so the shapes of its base are not known."
            )
        positions: dict[str, dict[str, torch.Tensor]] = {}
        for key, own in contents_of(self.config, self.file)[1].items():
            module, _, parameter = key.removeprefix(PREFIX).removesuffix(POSITIONS).partition(INTERNAL)
            positions.setdefault(module, {})[parameter] = own
        return Ticket(positions, self.file.shapes, self.config.granularity, self.config.external_widths or {})


def _part(key: str) -> str:
    if key == CODES or is_positions_key(key):
        return "positions"
    if is_adapter_key(key):
        return "internal" if INTERNAL in key else "external"
    return "heads"


def inspect(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """What is in an adapter: parameters, bytes, the ticket by layer, the base it was trained on."""
    saved = Saved.load(args.adapter, _options(args))
    config = saved.config
    has_shapes = bool(saved.file.shapes)
    report = TicketReport(saved.ticket) if has_shapes or not config.ticket_sizes else None
    base = Fingerprint.from_dict(config.base_fingerprint) if config.base_fingerprint else None
    found: dict[str, Any] = {
        "adapter": saved.name,
        "base_model": config.base_model_name_or_path,
        "base_class": (config.auto_mapping or {}).get("base_model_class"),
        "base_fingerprint": base
        and {"roots": list(base.roots), "layout": base.layout, "parameters": len(base.samples)},
        "budget": config.budget,
        "granularity": config.internal_granularity,
        "external_widths": config.external_widths,
        "heads": sorted(config.modules_to_save or ()),
        "adapted_heads": saved.adapted_heads,
        "parameters": saved.parameters,
        "bytes": saved.bytes | {"total": saved.size},
        "digest": saved.file.digest,
        "sealed": saved.file.config is not None,
        "ticket": report
        and {
            "size": report.ticket_size,
            "density": report.density,
            "layers": {
                n: dict(zip(("positions", "of", "width"), row, strict=True))
                for n, row in report.counts("layer").items()
            },
        },
    }
    where = f"{len(base.samples)} parameters of {' and '.join(base.roots) or 'the model'}" if base else "none"
    lines = [
        f"adapter      {saved.name}",
        f"base         {found['base_model'] or 'not named'} ({found['base_class'] or 'class not known'})",
        f"fingerprint  {where}",
        f"budget       {'widths and density were given' if config.budget is None else config.budget}",
        f"digest       {saved.file.digest[:16]}{'' if found['sealed'] else ' (no seal)'}",
        "",
        _table(
            ("part", "parameters", "bytes"),
            [
                *((part, _count(saved.parameters.get(part)), f"{n:,}") for part, n in saved.bytes.items()),
                *(
                    (f"(internal in {head})", _count(own["parameters"]), f"{own['bytes']:,}")
                    for head, own in found["adapted_heads"].items()
                ),
                ("total", f"{sum(saved.parameters.values()):,}", f"{saved.size:,}"),
            ],
        ),
        "",
        str(report) if report else "The shapes of the base are not in the file, so there are no densities.",
    ]
    return OK, found, "\n".join(lines)


def verify(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Whether an adapter is whole, fits a base model, and was trained on these weights."""
    saved = Saved.load(args.adapter, _options(args))
    _load(args, saved.config)
    found = {
        "ok": True,
        "digest": saved.file.digest,
        "sealed": saved.file.config is not None,
        "fingerprint": saved.config.base_fingerprint is not None,
    }
    text = f"{args.adapter}: whole, and fits {_base_name(args, saved.config)}"
    if not found["sealed"]:
        text += "\nIt has no seal, as another program saved it: damage to single values cannot be seen."
    if not found["fingerprint"]:
        text += "\nIt has no fingerprint: whether the base has the weights of the training cannot be told."
    return OK, found, text


def merge(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Fold the ticket's values and the heads into the base, and save it.

    External adapters cannot be folded into weights; they are saved beside it, as an adapter for the folded base.
    """
    saved = Saved.load(args.adapter, _options(args))
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise RefusedError(f"--out {str(out)!r} is not empty; name a new folder.")
    model = _load(args, saved.config)
    tensors = {k: t for k, t in get_peft_model_state_dict(model).items() if is_adapter_key(k) and INTERNAL not in k}
    for _, layer in sfa_layers(model):
        layer.remove_externals("default")
    folded = model.merge_and_unload(safe_merge=True)
    folded.save_pretrained(out)
    text = f"folded into {out}"
    found: dict[str, Any] = {"out": str(out), "external": None}
    if tensors:
        own = saved.config.to_dict() | {
            "ticket_sizes": {},
            "target_modules": [],
            "target_heads": None,
            "modules_to_save": None,
            "base_fingerprint": None,
            "base_model_name_or_path": str(out),
            "external_share": 1.0,
        }
        rest = PeftModel(folded, SFAConfig(**own))
        set_peft_model_state_dict(rest, tensors)
        rest.save_pretrained(str(out / EXTERNAL_FOLDER))
        found["external"] = str(out / EXTERNAL_FOLDER)
        text += f"; the external adapters, for that base: {out / EXTERNAL_FOLDER}"
    return OK, found, text


def diff(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """What two adapters have in common: the overlap of their tickets by layer, and their widths."""
    options = _options(args)
    a, b = (Saved.load(name, options) for name in (args.adapter, args.other))
    tickets = a.ticket, b.ticket
    overlap, layers = tickets[0].overlap(tickets[1]), tickets[0].overlap(tickets[1], per="layer")
    widths = {
        f"{place}: {module}": tuple((c.config.external_widths or {}).get(place, {}).get(module, 0) for c in (a, b))
        for c in (a, b)
        for place, modules in (c.config.external_widths or {}).items()
        for module in modules
    }
    differing = {name: pair for name, pair in widths.items() if pair[0] != pair[1]}
    same_base = a.config.base_fingerprint == b.config.base_fingerprint
    digests = [digest_of(tensors_of(c.config, c.file)) for c in (a, b)]  # packed or not
    difference = difference_of(a.config.to_dict(), b.config.to_dict())
    equal = digests[0] == digests[1] and difference is None
    found = {
        "overlap": _or_none(overlap),
        "layers": {name: _or_none(value) for name, value in layers.items()},
        "ticket_sizes": [t.size for t in tickets],
        "widths": {name: list(pair) for name, pair in differing.items()},
        "same_base": same_base,
        "difference": difference,
        "equal": equal,
    }
    lines = [
        f"a  {a.name}: {tickets[0].size:,} positions",
        f"b  {b.name}: {tickets[1].size:,} positions",
        f"overlap (IoU) {overlap:.3f}, {'the same' if same_base else 'not the same'} base"
        + (", equal" if equal else f"; another {difference}" if difference else ""),
        "",
        _table(("layer", "overlap"), [(name, f"{value:.3f}") for name, value in layers.items()]),
    ]
    if differing:
        lines += ["", _table(("width", "a", "b"), [(n, str(x), str(y)) for n, (x, y) in differing.items()])]
    return OK if equal else BAD, found, "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    wide = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return "\n".join(
        " ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, wide, strict=True)))
        for row in (head, *rows)
    )


def _or_none(value: float) -> float | None:
    """JSON has no NaN."""
    return None if value != value else value


def _count(number: int | None) -> str:
    return f"{number:,}" if number else "-"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    given = {"revision": args.revision, "token": args.token, "subfolder": args.subfolder}
    return {name: value for name, value in given.items() if value is not None}


def _load(args: argparse.Namespace, config: SFAConfig) -> PeftModel:
    """The base with the adapter; a base with other weights is an error."""
    base = _base(args, config)
    with warnings.catch_warnings():
        warnings.simplefilter("error", BaseMismatchWarning)
        try:
            return PeftModel.from_pretrained(base, args.adapter, **_options(args))
        except BaseMismatchWarning as error:
            raise CheckpointError(str(error)) from error


def _base_name(args: argparse.Namespace, config: SFAConfig) -> str:
    name = args.base or config.base_model_name_or_path
    if not name:
        raise RefusedError("the adapter does not name its base model: give --base MODEL.")
    return name


def _base(args: argparse.Namespace, config: SFAConfig) -> nn.Module:
    """The base model, by the class that the adapter was trained with, or else the one that its config names."""
    options = {} if args.num_labels is None else {"num_labels": args.num_labels, "ignore_mismatched_sizes": True}
    name = _base_name(args, config)
    if not args.base and config.revision:
        options["revision"] = config.revision
    try:
        own = transformers.AutoConfig.from_pretrained(name, revision=options.get("revision"))
        names = [(config.auto_mapping or {}).get("base_model_class"), *(own.architectures or ())]
        cls = next((getattr(transformers, name) for name in names if name and hasattr(transformers, name)), None)
        if cls is None:
            raise RefusedError(f"--base {name!r} is of a class that transformers does not have; load it in Python.")
        base: nn.Module = cls.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise RefusedError(f"--base {name!r} cannot be loaded: {error}") from error
    return base


Command = Callable[[argparse.Namespace], tuple[int, dict[str, Any], str]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sfa-peft",
        description="Look at saved SFA adapters. Exit codes: 0 fine, 1 damaged, unfit or different, 2 could not run.",
    )
    parser.add_argument("--version", action="version", version=f"sfa-peft {metadata.version('sfa-peft')}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def command(run: Command) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").strip()
        own = commands.add_parser(run.__name__, help=text.splitlines()[0], description=text)
        own.set_defaults(run=run)
        own.add_argument("adapter", metavar="PATH_OR_REPO", help="a folder, or a repository on the Hub")
        own.add_argument("--revision", help="of the repository")
        own.add_argument("--subfolder", help="of the folder or repository")
        own.add_argument("--token", help="for a private repository; the stored one unless given")
        own.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return own

    command(inspect)
    for run in (verify, merge):
        own = command(run)
        own.add_argument("--base", metavar="MODEL", help="the base model; the one that the adapter names unless given")
        own.add_argument("--num-labels", type=int, help="classes of the head, where the base has other ones")
        if run is merge:
            own.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    command(diff).add_argument("other", metavar="OTHER", help="another adapter")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    args = _parser().parse_args(argv)
    warnings.simplefilter("ignore", FutureWarning)  # of transformers, for its developers
    try:
        run: Command = args.run
        code, found, text = run(args)
    except CheckpointError as error:
        code, found, text = BAD, {"ok": False, "error": str(error)}, f"sfa-peft: {error}"
    except (RefusedError, HfHubHTTPError, ValueError, OSError) as error:
        why = f"{error} ({str(error.__cause__).splitlines()[0]})" if str(error.__cause__ or "") else str(error)
        code, found, text = TROUBLE, {"ok": False, "error": why}, f"sfa-peft: {why}"
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        print(text, file=sys.stdout if "error" not in found else sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
