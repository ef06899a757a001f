"""The `sfa-peft` command: inspects, verifies, merges, compares and extracts saved adapters."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import torch
from huggingface_hub.errors import HfHubHTTPError
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict

from .checkpoint import CheckpointError
from .checkpoint.fingerprint import Fingerprint
from .checkpoint.names import INTERNAL, POSITIONS, PREFIX, is_adapter_key, is_positions_key
from .checkpoint.packing import CODES
from .checkpoint.reader import contents_of, difference_of, tensors_of, weights_of
from .checkpoint.seal import AdapterFile, digest_of, read
from .config import SFAConfig
from .hub.base import class_name_of, load_model, quiet, source_for
from .hub.dense import load_with_base, on_base, processor_of
from .layers.merged import merged_leaves, remove_externals
from .planning.base import in_module
from .recorded import RecordedConfig
from .search import extract_adapter
from .ticket import Ticket, TicketReport
from .ticket.text import printable
from .tuner.folding import ExternalsKeptWarning, fold_externals

OK, BAD, TROUBLE = 0, 1, 2
EXTERNAL_FOLDER = "external"


class RefusedError(Exception):
    """A command cannot be run. The message says why."""


@dataclass
class Saved:
    """A saved adapter that has been read and checked."""

    name: str
    config: RecordedConfig
    file: AdapterFile
    size: int

    @classmethod
    def load(cls, name: str, options: dict[str, Any]) -> Saved:
        config = SFAConfig.from_pretrained(name, **options)
        if not isinstance(class_name_of(config), str | None):
            raise CheckpointError(
                f"adapter_config.json of {name!r} is not valid: auto_mapping.base_model_class="
                f"{class_name_of(config)!r} is not the name of a class. Download the adapter or save it again."
            )
        weights = weights_of(name, **options)
        if weights is None or not isinstance(config, RecordedConfig):
            raise RefusedError(f"{name!r} has a config, but no weights; save the adapter with save_pretrained.")
        return cls(name, config, read(weights), weights.stat().st_size)

    @property
    def bytes(self) -> dict[str, int]:
        """The bytes of each part of the file."""
        counted: Counter[str] = Counter()
        for key, tensor in self.file.tensors.items():
            counted[_part(key)] += tensor.numel() * tensor.element_size()
        counted["names and seal"] = self.size - sum(counted.values())
        return dict(counted)

    @property
    def parameters(self) -> dict[str, int]:
        """The number of parameters in each part of the adapter."""
        counted: Counter[str] = Counter()
        for key, tensor in self.file.tensors.items():
            if (part := _part(key)) != "positions":
                counted[part] += tensor.numel()
        return dict(counted)

    @property
    def adapted_heads(self) -> dict[str, dict[str, int]]:
        """The number of internal values, and their bytes, in each of `target_heads`."""
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
                f"{self.name!r} was not saved by sfa_peft, so the shapes of its base are not known; load it in Python "
                f"and save it again."
            )
        positions: dict[str, dict[str, torch.Tensor]] = {}
        for key, indices in contents_of(self.config, self.file)[1].items():
            module, _, parameter = key.removeprefix(PREFIX).removesuffix(POSITIONS).partition(INTERNAL)
            positions.setdefault(module, {})[parameter] = indices
        return Ticket(positions, self.file.shapes, self.config.granularity, self.config.external_widths)


def _part(key: str) -> str:
    if key == CODES or is_positions_key(key):
        return "positions"
    if is_adapter_key(key):
        return "internal" if INTERNAL in key else "external"
    return "heads"


def inspect(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Show the content of an adapter: parameters, bytes, the ticket by layer, and the base model."""
    saved = Saved.load(args.adapter, _options(args))
    config = saved.config
    has_shapes = bool(saved.file.shapes)
    report = TicketReport(saved.ticket) if has_shapes or not config.ticket_sizes else None
    base = Fingerprint.from_dict(config.base_fingerprint) if config.base_fingerprint else None
    found: dict[str, Any] = {
        "adapter": saved.name,
        "base_model": config.base_model_name_or_path,
        "base_class": class_name_of(config),
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
        f"adapter      {printable(saved.name)}",
        f"base         {printable(config.base_model_name_or_path or 'not named')} "
        f"({printable(class_name_of(config) or 'class not known')})",
        f"fingerprint  {printable(where)}",
        f"budget       {'widths and density were given' if config.budget is None else config.budget}",
        f"digest       {saved.file.digest[:16]}{'' if found['sealed'] else ' (no seal)'}",
        "",
        _table(
            ("part", "parameters", "bytes"),
            [
                *((part, _count(saved.parameters.get(part)), f"{n:,}") for part, n in saved.bytes.items()),
                *(
                    (f"(internal in {head})", _count(counts["parameters"]), f"{counts['bytes']:,}")
                    for head, counts in found["adapted_heads"].items()
                ),
                ("total", f"{sum(saved.parameters.values()):,}", f"{saved.size:,}"),
            ],
        ),
        "",
        str(report) if report else "The shapes of the base are not in the file, so there are no densities.",
    ]
    return OK, found, "\n".join(lines)


def verify(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Check that an adapter is not damaged, fits the base model, and was trained on the base model's weights."""
    saved = Saved.load(args.adapter, _options(args))
    _load(args, saved.config)
    found = {
        "ok": True,
        "digest": saved.file.digest,
        "sealed": saved.file.config is not None,
        "fingerprint": saved.config.base_fingerprint is not None,
    }
    text = printable(f"{args.adapter}: not damaged, and fits {args.base or saved.config.base_model_name_or_path}")
    if not found["sealed"]:
        text += "\nIt has no seal, since another program saved it, so damage to single values is not detected."
    if not found["fingerprint"]:
        text += "\nIt has no fingerprint, so it is not known whether the base has the weights used in training."
    return OK, found, text


def merge(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Merge an adapter and its heads into the base model, and save it as a model of transformers.

    External adapters become wider MLPs. Those that cannot (another place or activation, SwiGLU, Swinv2) are saved in a
    subfolder, as an adapter for the merged model.
    """
    saved = Saved.load(args.adapter, _options(args))
    out = _new_folder(args)
    model = _load(args, saved.config)
    tensors = {k: t for k, t in get_peft_model_state_dict(model).items() if is_adapter_key(k) and INTERNAL not in k}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExternalsKeptWarning)
        merged = model.merge_and_unload(safe_merge=True, widen=False)
    kept = fold_externals(merged, args.widen)
    leaves = merged_leaves(merged)
    remove_externals(merged, leaves.values())
    merged.save_pretrained(out)
    processor = processor_of(args.adapter, _options(args))
    if processor is not None:
        processor.save_pretrained(out)
    text = f"merged model: {out}"
    found: dict[str, Any] = {"out": str(out), "external": None, "not_folded": kept}
    if kept:
        widths = {
            place: {name: width for name, width in modules.items() if name in kept}
            for place, modules in saved.config.external_widths.items()
        }
        fields = saved.config.to_dict() | {
            "external_widths": widths,
            "ticket_sizes": {},
            "target_modules": [],
            "target_heads": None,
            "modules_to_save": None,
            "base_fingerprint": None,
            "base_model_name_or_path": str(out),
            "external_share": 1.0,
        }
        rest = PeftModel(merged, RecordedConfig(**fields))
        prefixes = tuple(f"{PREFIX}{name}." for name in kept)
        set_peft_model_state_dict(rest, {k: t for k, t in tensors.items() if k.startswith(prefixes)})
        rest.save_pretrained(str(out / EXTERNAL_FOLDER))
        found["external"] = str(out / EXTERNAL_FOLDER)
        text += f"\nexternal adapters on {len(kept)} modules are not in it, but in {out / EXTERNAL_FOLDER}:\n"
        text += "\n".join(f"  {why}" for why in dict.fromkeys(kept.values()))
    return OK, found, text


def extract(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Make an adapter out of a base model and a fine-tuned model, of the weights where they differ.

    Without --budget it has all differences. With it, it has the largest ones, and the norm of those that are left out
    is printed. The heads that are named with --modules-to-save are taken over whole.
    """
    out = _new_folder(args)
    goal = load_model(args.finetuned, "FINETUNED", {}, ())
    labels = {"num_labels": args.num_labels, "ignore_mismatched_sizes": True} if args.num_labels else {}
    base = load_model(args.base, "BASE", labels, (type(goal).__name__,))
    model, extraction = extract_adapter(base, goal, args.budget, modules_to_save=args.modules_to_save)
    model.save_pretrained(str(out))
    found = {"out": str(out), **asdict(extraction)}
    return OK, found, f"adapter: {out}\n{extraction}"


def _new_folder(args: argparse.Namespace) -> Path:
    out = Path(args.out)
    if out.exists() and any(out.iterdir()):
        raise RefusedError(f"--out {str(out)!r} is not empty; name a new folder.")
    return out


def _budget(text: str) -> int | float:
    return float(text) if "." in text or "e" in text else int(text)


def diff(args: argparse.Namespace) -> tuple[int, dict[str, Any], str]:
    """Compare two adapters: the overlap of their tickets by layer, and their widths."""
    options = _options(args)
    a, b = (Saved.load(name, options) for name in (args.adapter, args.other))
    tickets = a.ticket, b.ticket
    overlap, layers = tickets[0].overlap(tickets[1]), tickets[0].overlap(tickets[1], per="layer")
    widths = {
        f"{place}: {module}": tuple(c.config.external_widths.get(place, {}).get(module, 0) for c in (a, b))
        for c in (a, b)
        for place, modules in c.config.external_widths.items()
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
        f"a  {printable(a.name)}: {tickets[0].size:,} positions",
        f"b  {printable(b.name)}: {tickets[1].size:,} positions",
        f"overlap (IoU) {overlap:.3f}, {'the same' if same_base else 'not the same'} base"
        + (", equal" if equal else f"; they differ in {printable(difference)}" if difference else ""),
        "",
        _table(("layer", "overlap"), [(name, f"{value:.3f}") for name, value in layers.items()]),
    ]
    if differing:
        lines += ["", _table(("width", "a", "b"), [(n, str(x), str(y)) for n, (x, y) in differing.items()])]
    return OK if equal else BAD, found, "\n".join(lines)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    shown = [[printable(cell) for cell in row] for row in (head, *rows)]
    wide = [max(len(row[i]) for row in shown) for i in range(len(head))]
    return "\n".join(
        " ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, wide, strict=True)))
        for row in shown
    )


def _or_none(value: float) -> float | None:
    """None for NaN, which JSON does not have."""
    return None if value != value else value


def _count(number: int | None) -> str:
    return f"{number:,}" if number else "-"


def _options(args: argparse.Namespace) -> dict[str, Any]:
    given = {"revision": args.revision, "token": args.token, "subfolder": args.subfolder}
    return {name: value for name, value in given.items() if value is not None}


def _load(args: argparse.Namespace, config: SFAConfig) -> PeftModel:
    """The base model with the adapter. A base with other weights is an error."""
    if args.num_labels is None:
        return load_with_base(args.adapter, config, _options(args), args.base, "--base")
    name, where = source_for(config, _options(args), args.base, "--base")
    labels = {"num_labels": args.num_labels, "ignore_mismatched_sizes": True}
    base = load_model(name, "--base", labels | where, (class_name_of(config),))
    return on_base(base, args.adapter, _options(args))


Command = Callable[[argparse.Namespace], tuple[int, dict[str, Any], str]]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sfa-peft",
        description="Inspect, verify, merge, compare and extract saved SFA adapters. Exit codes: 0 success; 1 the "
        "adapter is damaged, does not fit the base model, or differs from the other one; 2 the command could not run.",
    )
    parser.add_argument("--version", action="version", version=f"sfa-peft {metadata.version('sfa-peft')}")
    commands = parser.add_subparsers(required=True, metavar="command")

    def plain(run: Command) -> argparse.ArgumentParser:
        text = (run.__doc__ or "").strip()
        subparser = commands.add_parser(run.__name__, help=text.splitlines()[0], description=text)
        subparser.set_defaults(run=run)
        subparser.add_argument("--json", action="store_true", help="print JSON instead of tables")
        return subparser

    def command(run: Command) -> argparse.ArgumentParser:
        subparser = plain(run)
        subparser.add_argument("adapter", metavar="PATH_OR_REPO", help="a folder, or a repository on the Hub")
        subparser.add_argument("--revision", help="revision of the repository")
        subparser.add_argument("--subfolder", help="subfolder of the folder or repository")
        subparser.add_argument("--token", help="token for a private repository (default: the stored token)")
        return subparser

    command(inspect)
    for run in (verify, merge):
        subparser = command(run)
        subparser.add_argument("--base", metavar="MODEL", help="base model (default: the one in the adapter's config)")
        subparser.add_argument("--num-labels", type=int, help="classes of the head, if they differ from the base's")
        if run is merge:
            subparser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the merged model")
            subparser.add_argument(
                "--widen",
                action=argparse.BooleanOptionalAction,
                default="auto",
                help="make MLPs wider with zeros wherever external adapters need it, or never (default: where it adds "
                "at most a tenth to the MLPs)",
            )
    command(diff).add_argument("other", metavar="OTHER", help="another adapter")
    subparser = plain(extract)
    subparser.add_argument("base", metavar="BASE", help="the base model: a folder, or a repository on the Hub")
    subparser.add_argument("finetuned", metavar="FINETUNED", help="the fine-tuned model")
    subparser.add_argument("--out", required=True, metavar="DIR", help="a new folder for the adapter")
    subparser.add_argument("--budget", type=_budget, help="most values: a number, or a fraction of the backbone")
    subparser.add_argument("--modules-to-save", nargs="+", metavar="MODULE", help="heads, which are taken over whole")
    subparser.add_argument("--num-labels", type=int, help="classes of the base's head, if they differ from its own")
    return parser


@contextmanager
def _only_own_output() -> Iterator[None]:
    """What transformers logs of a file, such as names of tensors, is not printed, and warnings are made printable."""

    def show(message: Warning | str, *about: Any, **more: Any) -> None:
        _print(f"sfa-peft: warning: {message}", sys.stderr)

    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from transformers; not relevant to users of the command
        warnings.showwarning = show
        yield


def _print(text: str, stream: TextIO) -> None:
    """Print text that may be from a file: no order to the terminal, and nothing that the stream cannot encode."""
    shown = "\n".join(map(printable, text.split("\n")))
    encoding = stream.encoding or "utf-8"
    print(shown.encode(encoding, "backslashreplace").decode(encoding), file=stream)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Returns the exit code."""
    args = _parser().parse_args(argv)
    try:
        run: Command = args.run
        with _only_own_output():
            code, found, text = run(args)
    except CheckpointError as error:
        code, found, text = BAD, {"ok": False, "error": str(error)}, f"sfa-peft: {error}"
    except (RefusedError, HfHubHTTPError, ValueError, OSError) as error:
        cause = next(iter(str(error.__cause__ or "").splitlines()), "")
        why = f"{error} ({cause})" if cause not in str(error) else str(error)
        code, found, text = TROUBLE, {"ok": False, "error": why}, f"sfa-peft: {why}"
    if args.json:
        print(json.dumps(found, indent=2))
    else:
        _print(text, sys.stdout if "error" not in found else sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
