"""Files that were made to do harm: an attacker knows the format, and can compute digest and seal.

Each function with `@_kind` gives the attacks of one kind.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fuzz_damage import CHANGES
from fuzz_runner import CONFIG, LOADS, SEARCH, TICKET, WEIGHTS, Attack, World
from sfa_peft import SFAConfig
from sfa_peft.checkpoint.coding import encode_positions
from sfa_peft.checkpoint.files import load_tensors, save_tensors
from sfa_peft.checkpoint.packing import join_codes, pack
from sfa_peft.checkpoint.reader import tensors_of
from sfa_peft.checkpoint.seal import DIGEST, KEY, digest_of, read
from sfa_peft.checkpoint.writer import write_adapter

Make = Callable[[Path], None]
KINDS: dict[str, Callable[[World, int, int], Iterator[Attack]]] = {}
P = "base_model.model."
CHUNK = 262_144  # positions
SLOW_PATTERN = "([a-z0-9_.]+)+!"


def _kind(function: Callable[[World, int, int], Iterator[Attack]]) -> Callable[[World, int, int], Iterator[Attack]]:
    KINDS[function.__name__] = function
    return function


class Parts:
    """What is in the folder of an adapter: fields of the config, tensors (unpacked, positions coded), shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fields: dict[str, Any] = json.loads((folder / CONFIG).read_text())
        file = read(folder / WEIGHTS)
        self.shapes: dict[str, Any] = dict(file.shapes)
        self.tensors = {n: t.clone() for n, t in tensors_of(SFAConfig.from_pretrained(folder), file).items()}
        self.more: dict[str, Tensor] = {}  # tensors that are not packed
        self.digest = self.fields.pop(DIGEST)

    def write_config(self) -> None:
        """Write the config only. Its digest says that the weights were saved with it."""
        (self.folder / CONFIG).write_text(json.dumps({DIGEST: self.digest, **self.fields}))

    def write_sealed(self) -> None:
        """Write everything, with a right digest and a right seal."""
        with mock.patch("sfa_peft.checkpoint.writer.MAX_SEAL", 1 << 40):  # an attacker has no limit
            write_adapter(self.folder, pack(self.tensors) | self.more, self.fields, self.shapes)

    def write_unsealed(self) -> None:
        """Write everything as another program may do."""
        (self.folder / CONFIG).write_text(json.dumps(self.fields))
        save_file(
            {n: t.contiguous() for n, t in (self.tensors | self.more).items()}, self.folder / WEIGHTS, {"format": "pt"}
        )

    def write_seal(self, sealed: Callable[[str], str]) -> None:
        """Write everything, with a right digest, but any text in the seal: `sealed` gets the right one."""
        packed = pack(self.tensors)
        fields = {**self.fields, DIGEST: digest_of(packed)}
        (self.folder / CONFIG).write_text(json.dumps(fields))
        text = sealed(json.dumps({"config": fields, "shapes": self.shapes}))
        seal = base64.b85encode(zlib.compress(text.encode(), 9)).decode()
        save_tensors(self.folder / WEIGHTS, packed, {"format": "pt", KEY: seal})

    @property
    def name(self) -> str:
        """A weight in the ticket."""
        return next(name for name in sorted(self.fields["ticket_sizes"]) if name.endswith("mlp.fc1.weight"))

    @property
    def keys(self) -> tuple[str, str]:
        """The keys of its values and of its code."""
        module, _, parameter = self.name.rpartition(".")
        key = f"{P}{module}.sfa_internal.{parameter}"
        return key, f"{key}_positions"


def _edit(change: Callable[[Parts], None], write: str = "sealed") -> Make:
    def make(folder: Path) -> None:
        parts = Parts(folder)
        change(parts)
        getattr(parts, f"write_{write}")()

    return make


@_kind
def good(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Nothing is wrong with the file. If one of these fails, the other results are worth nothing."""
    for source in world.sources:
        ways = ("from_pretrained", "load_adapter", "transformers", "auto", "config", "verify", "inspect", "merge")
        yield Attack("good", source, lambda folder: None, ways, source=source)
    yield Attack("good", "elements again", lambda folder: None, ("hotswap", "state_dict", "diff"))
    yield Attack("good", "written anew", _edit(lambda parts: None), LOADS)
    yield Attack("good", "written by another program", _edit(lambda parts: None, "unsealed"), LOADS)
    yield Attack("good", "a ticket", lambda folder: _copy(world.ticket_file, folder / TICKET), ("ticket",))
    yield Attack("good", "a search", lambda folder: _copy(world.search_file, folder / SEARCH), ("search",))


def _copy(source: Path, target: Path) -> None:
    shutil.copy(source, target)


# 1. Tensors that do not belong to the adapter


@_kind
def extra(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Tensors that the adapter does not have, and that would go into the base or into another adapter."""
    leaf = "backbone.swin.encoder.layers.0.blocks.0.mlp.fc1"
    norm = "decode_head.bottleneck.batch_norm"
    head = "decode_head.classifier"
    keys = (
        f"{leaf}.weight",
        f"{leaf}.bias",
        f"{leaf}.base_layer.weight",
        f"{leaf}.base_layer.bias",
        f"{leaf}.sfa_internal.default.weight",
        f"{leaf}.sfa_internal.default.weight_positions",
        f"{leaf}.sfa_external.up.weight",
        "backbone.swin.embeddings.patch_embeddings.projection.weight",
        "backbone.swin.layernorm.weight",
        "decode_head.bottleneck.conv.weight",
        f"{norm}.running_mean",
        f"{norm}.running_var",
        f"{norm}.num_batches_tracked",
        f"{head}.original_module.weight",
        f"{head}.original_module.bias",
        f"{head}.modules_to_save.default.weight",
        f"{head}.modules_to_save.new.weight",
        f"{head}.modules_to_save.weight",
        f"{head}.extra",
        "sfa_internal.weight",
        "",
    )
    shapes = {name: tuple(t.shape) for name, t in world.reference.items()}
    for key in keys:
        plain = key.replace(".base_layer", "").replace(".original_module", "").replace(".modules_to_save", "")
        plain = plain.replace(".default", "").replace(".new", "")
        for prefix in (P, "") if key in keys[:3] else (P,):

            def add(parts: Parts, key: str = prefix + key, shape: tuple[int, ...] = shapes.get(plain, (2,))) -> None:
                whole = key.endswith("num_batches_tracked")
                parts.more[key] = torch.full(shape, 7 if whole else 0.5)

            for write in ("sealed", "unsealed"):
                yield Attack("extra", f"{prefix}{key} ({write})", _edit(add, write), LOADS, must_refuse=True)


@_kind
def missing(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Each tensor of the adapter missing in turn, beginning with those of the head."""
    names = sorted(Parts(world.sources["elements"]).tensors, key=lambda name: ".sfa_" in name)
    for name in names[:12]:
        for write in ("sealed", "unsealed"):

            def remove(parts: Parts, name: str = name) -> None:
                del parts.tensors[name]

            # A sealed file cannot be packed without its positions.
            if write == "sealed" and ".sfa_internal." in name:
                continue
            yield Attack("missing", f"{name} ({write})", _edit(remove, write), LOADS, must_refuse=True)


# 2. Configs

CONFIG_WAYS = ("from_pretrained", "hotswap", "transformers", "load_adapter", "config")


def _forged_and_edited(kind: str, name: str, change: Callable[[Parts], None], **options: Any) -> Iterator[Attack]:
    for write in ("config", "sealed"):
        yield Attack(kind, f"{name} ({'edited' if write == 'config' else 'forged'})", _edit(change, write), **options)


@_kind
def patterns(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Regular expressions that take forever, that are none, or that are too large."""
    values: dict[str, Any] = {
        "slow": SLOW_PATTERN,
        "slow 2": "(.*)*(.*)*(.*)*(.*)*!",
        "slow 3": "(?:(?:a|[a-z_.0-9])+)+$x",
        "(": "(",
        "[": "[",
        "5,000 brackets": "(" * 5000 + ")" * 5000,
        "10 MB": "a" * 10_000_000,
        "many groups": "(a)" * 100_000,
        "huge repeat": "(?:a{1,65000}){1,65000}",
        "null": "\0",
    }
    fields = ("exclude_modules", "target_modules", "external_modules", "layers_pattern", "target_heads",
              "modules_to_save", "external_width", "rank_pattern")  # fmt: skip
    for field in fields:
        for label, value in values.items():

            def change(parts: Parts, field: str = field, value: str = value) -> None:
                lists = field in ("target_heads", "modules_to_save")
                parts.fields[field] = [value] if lists else {value: 2} if field == "external_width" else value
                if field == "layers_pattern":
                    parts.fields["layers_to_transform"] = [0]
                    parts.fields["target_modules"] = ["fc1", "fc2"]
                if field == "external_width":  # without a budget the width decides, and without sizes it is used
                    parts.fields.update(budget=None, internal_density=0.1)

            name = f"{field}: {label}"
            ways = ("from_pretrained",) if label == "10 MB" else ("from_pretrained", "transformers")
            yield from _forged_and_edited("patterns", name, change, ways=ways)
            if field == "external_width":

                def unsized(parts: Parts, change: Callable[[Parts], None] = change) -> None:
                    change(parts)
                    parts.fields.update(ticket_sizes=None, external_widths=None)

                yield Attack("patterns", f"{name}, no sizes", _edit(unsized, "unsealed"))


@_kind
def fields(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Values of wrong types in every field of the config."""
    values: dict[str, Any] = {
        "5": 5,
        "-1": -1,
        "0": 0,
        "true": True,
        "null": None,
        "[]": [],
        "{}": {},
        "infinity": float("inf"),
        "nan": float("nan"),
        "nested lists": [[["a"]]],
        "nested dicts": {"a": {"b": {"c": 1}}},
        "list of null": [None],
        "huge": 10**400,
        "2^63": 2**63,
        "text": "a b",
        "surrogate": "\ud800",
        "surrogate in a list": ["\ud800"],
    }
    names = sorted({f.name for f in dataclasses.fields(SFAConfig)} | set(Parts(world.sources["elements"]).fields))
    names = [name for name in names if name != "base_model_name_or_path"]  # where to look, not what to load
    for field in names:
        for label, value in values.items():

            def change(parts: Parts, field: str = field, value: Any = value) -> None:
                parts.fields[field] = value

            yield from _forged_and_edited("fields", f"{field}: {label}", change, ways=CONFIG_WAYS)


@_kind
def texts(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Configs that are not the JSON that they should be."""

    def put(text: Callable[[str], str | bytes]) -> Make:
        def make(folder: Path) -> None:
            new = text((folder / CONFIG).read_text())
            (folder / CONFIG).write_bytes(new if isinstance(new, bytes) else new.encode())

        return make

    def with_field(value: str) -> Make:
        return put(lambda old: old.rstrip().removesuffix("}") + f', "extra": {value}}}')

    deep = 100_000
    cases = {
        "deep lists": put(lambda old: "[" * deep + "]" * deep),
        "deep objects": put(lambda old: '{"a":' * deep + "1" + "}" * deep),
        "deep lists in a field": with_field("[" * deep + "]" * deep),
        "an unknown field": with_field("1"),
        "a million unknown fields": put(
            lambda old: old.rstrip().removesuffix("}") + "".join(f', "x{i}": 0' for i in range(10**6)) + "}"
        ),
        "a field twice": put(lambda old: old.rstrip().removesuffix("}") + ', "external_scale": 3.0}'),
        "the type twice": put(lambda old: old.rstrip().removesuffix("}") + ', "peft_type": "LORA"}'),
        "no type": put(lambda old: old.replace('"peft_type"', '"type"')),
        "a type that is a list": put(lambda old: old.replace('"SFA"', '["SFA"]')),
        "a type that is null": put(lambda old: old.replace('"SFA"', "null")),
        "an unknown type": put(lambda old: old.replace('"SFA"', '"SFB"')),
        "an int of 10,000 digits": with_field("9" * 10_000),
        "empty": put(lambda old: ""),
        "null": put(lambda old: "null"),
        "a list": put(lambda old: f"[{old}]"),
        "UTF-16": put(lambda old: old.encode("utf-16")),
        "a byte order mark": put(lambda old: b"\xef\xbb\xbf" + old.encode()),
        "not UTF-8": put(lambda old: old.encode() + b"\xff\xfe"),
        "a null byte": put(lambda old: old + "\0"),
        "an empty name": with_field('{"": 0}'),
        "self": put(lambda old: old.replace('"SFA"', '"SFA", "self": 1')),
        "pretrained name": put(lambda old: old.replace('"SFA"', '"SFA", "pretrained_model_name_or_path": "x"')),
    }
    for name, make in cases.items():
        yield Attack("texts", name, make, (*CONFIG_WAYS, "verify", "inspect"))


# 3. Bombs


def _contiguous(chunks: int) -> Tensor:
    """The code of the first positions: as many chunks, each in some 500 bytes."""
    return encode_positions(torch.arange(CHUNK)).repeat(chunks)


@_kind
def bombs(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Small files that ask for much memory or time."""

    def padded(parts: Parts, size: int, item: str) -> None:
        parts.write_seal(lambda text: text[:-1] + ', "x": [' + ",".join([item] * (size // (len(item) + 1))) + "]}")

    for size, label in ((5_000_000, "5 MB"), (60_000_000, "60 MB"), (400_000_000, "400 MB")):
        for item in ('{"":0}', "[]", "0", '""'):

            def make(folder: Path, size: int = size, item: str = item) -> None:
                padded(Parts(folder), size, item)

            yield Attack("bombs", f"a seal of {label} of {item}", make, ("from_pretrained", "config", "inspect"))

    def rows(parts: Parts, units: int, code: Tensor, size: int | None = None) -> None:
        values, positions = parts.keys
        size = units if size is None else size
        parts.fields.update(internal_granularity="row")
        parts.shapes[parts.name] = (units, 0)
        parts.fields["ticket_sizes"] = {parts.name: size}
        parts.tensors = {n: t for n, t in parts.tensors.items() if ".sfa_internal." not in n}
        parts.tensors |= {values: torch.empty(size, 0), positions: code}

    for chunks in (40, 1000):
        code = _contiguous(chunks)
        for write in ("sealed", "unsealed"):
            change = partial(rows, units=chunks * CHUNK, code=code)
            name = f"{chunks * CHUNK:,} empty rows ({write})"
            yield Attack("bombs", name, _edit(change, write), ("from_pretrained", "inspect", "state_dict"))
    for label, code in (("zeros", torch.zeros(400_000, dtype=torch.uint8)), ("nothing", torch.empty(0).byte())):
        for write in ("sealed", "unsealed"):
            change = partial(rows, units=2**40, code=code, size=26_000_000_000)
            yield Attack("bombs", f"2.6e10 rows, coded by {label} ({write})", _edit(change, write))

            def sizes(parts: Parts, code: Tensor = code) -> None:
                parts.fields["ticket_sizes"][parts.name] = 26_000_000_000
                parts.tensors[parts.keys[1]] = code

            yield Attack("bombs", f"2.6e10 positions, coded by {label} ({write})", _edit(sizes, write))

    def external(parts: Parts, width: int, is_empty: bool) -> None:
        (module,) = list(parts.fields["external_widths"]["block"])[:1]
        parts.fields["external_widths"]["block"][module] = width
        if is_empty:
            key = f"{P}{module}.sfa_block"
            parts.tensors[f"{key}.down.weight"] = torch.empty(width, 0)
            parts.tensors[f"{key}.up.weight"] = torch.empty(0, width)
            parts.tensors[f"{key}.down.bias"] = torch.empty(width, 0)

    for width in (100_000, 10**9, 2**62):
        for is_empty in (True, False):
            change = partial(external, width=width, is_empty=is_empty)
            name = f"a width of {width:,}{' without bytes' if is_empty else ''}"
            yield from _forged_and_edited("bombs", name, change, ways=("from_pretrained", "transformers", "hotswap"))

    def many(folder: Path, number: int) -> None:
        parts = Parts(folder)
        parts.tensors |= {f"{P}x{i}": torch.empty(0) for i in range(number)}
        parts.write_unsealed()

    for number in (15_000, 1_000_000):
        ways = ("from_pretrained", "inspect")
        yield Attack("bombs", f"{number:,} empty tensors", partial(many, number=number), ways, must_refuse=True)

    def long_header(folder: Path, character: str, size: int) -> None:
        parts = Parts(folder)
        parts.write_unsealed()
        save_file(parts.tensors, folder / WEIGHTS, {"format": "pt", "x": character * size})

    for label, character in (("a", "a"), ("brackets", "["), ("escapes", "\n")):
        size = 90_000_000 // len(json.dumps(character)[1:-1])
        yield Attack("bombs", f"a header of 90 MB of {label}", partial(long_header, character=character, size=size))

    def ticket(folder: Path, **changes: Any) -> None:
        shutil.copy(world.ticket_file, folder / TICKET)
        tensors, metadata = load_tensors(folder / TICKET)
        described = json.loads(metadata["ticket"])
        code = changes.pop("code", tensors["positions"])
        save_file({"positions": code}, folder / TICKET, metadata | {"ticket": json.dumps(described | changes)})

    for chunks in (40, 1000):
        changes = {
            "sizes": {"a.weight": chunks * CHUNK},
            "shapes": {"a.weight": [2**31, 2**10]},
            "code": join_codes([_contiguous(chunks)]),
        }
        yield Attack("bombs", f"a ticket of {chunks * CHUNK:,} positions", partial(ticket, **changes), ("ticket",))
    for code in (join_codes([torch.zeros(400_000).byte()]), join_codes([torch.empty(0).byte()])):
        changes = {"sizes": {"a.weight": 26 * 10**9}, "shapes": {"a.weight": [2**31, 2**10]}, "code": code}
        yield Attack("bombs", f"a ticket of 2.6e10 in {len(code)} bytes", partial(ticket, **changes), ("ticket",))
    for label, changes in {
        "infinite sizes": {"sizes": {"a.weight": float("inf")}},
        "infinite shapes": {"shapes": {"a.weight": [float("inf")]}},
        "deep": {"criterion": [[]]},
        "no sizes": {"sizes": None},
        "a granularity that is a list": {"granularity": []},
        "widths that are numbers": {"widths": {"mlp": 3}},
    }.items():
        yield Attack("bombs", f"a ticket with {label}", partial(ticket, **changes), ("ticket",))


@_kind
def dtypes(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Tensors of any dtype that safetensors knows, and data that does not lie as the header says."""
    bits = {"BOOL": 8, "U8": 8, "I8": 8, "I16": 16, "U16": 16, "U32": 32, "U64": 64, "I32": 32, "I64": 64, "F16": 16,
            "BF16": 16, "F64": 64, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6,
            "F6_E3M2": 6, "X": 32}  # fmt: skip

    def retype(folder: Path, key: str, dtype: str) -> None:
        parts = Parts(folder)
        parts.write_unsealed()
        header, data = _raw(folder / WEIGHTS)
        entry = header[next(k for k in header if key in k)]
        numel = 1
        for n in entry["shape"]:
            numel *= n
        size = numel * bits[dtype] // 8
        entry.update(dtype=dtype, data_offsets=[len(data), len(data) + size])
        _write_raw(folder / WEIGHTS, _gapless(header, data + bytes(size)))

    for key in ("classifier.weight", "classifier.bias", "sfa_block.down.weight", "fc1.sfa_internal.weight",
                "fc1.sfa_internal.weight_positions"):  # fmt: skip
        for dtype in bits:
            make = partial(retype, key=key, dtype=dtype)
            # Every other tensor has floating values.
            is_wrong = dtype != "U8" if key.endswith("_positions") else not dtype.startswith(("F", "BF"))
            yield Attack("dtypes", f"{key} as {dtype}", make, LOADS[:5], must_refuse=is_wrong)

    def offsets(folder: Path, change: Callable[[dict[str, Any], int], None]) -> None:
        header, data = _raw(folder / WEIGHTS)
        change(header, len(data))
        _write_raw(folder / WEIGHTS, (header, data))

    def entry_of(header: dict[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = header[next(k for k in header if "classifier.weight" in k)]
        return found

    changes: dict[str, Callable[[dict[str, Any], int], None]] = {
        "overlap": lambda h, n: entry_of(h).update(data_offsets=[0, 48]),
        "beyond the end": lambda h, n: entry_of(h).update(data_offsets=[n, n + 48]),
        "backwards": lambda h, n: entry_of(h).update(data_offsets=[48, 0]),
        "negative": lambda h, n: entry_of(h).update(data_offsets=[-48, 0]),
        "huge": lambda h, n: entry_of(h).update(data_offsets=[0, 2**63]),
        "a huge shape": lambda h, n: entry_of(h).update(shape=[2**32, 2**32]),
        "a shape that overflows": lambda h, n: entry_of(h).update(shape=[2**63, 2, 0]),
        "a negative shape": lambda h, n: entry_of(h).update(shape=[-3, -4, 1, 1]),
        "no shape": lambda h, n: entry_of(h).pop("shape"),
        "a dtype that is a number": lambda h, n: entry_of(h).update(dtype=1),
        "metadata with numbers": lambda h, n: h.update(__metadata__={"format": 1}),
        "metadata that is a list": lambda h, n: h.update(__metadata__=[]),
    }
    for name, change in changes.items():
        yield Attack("dtypes", f"offsets: {name}", partial(offsets, change=change), LOADS[:5])


def _raw(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def _gapless(header: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytes]:
    """The same with the data in the order of the header, without holes."""
    parts, at = [], 0
    for name, entry in header.items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            parts.append(data[begin:end])
            entry["data_offsets"] = [at, at + end - begin]
            at += end - begin
    return header, b"".join(parts)


def _write_raw(path: Path, content: tuple[dict[str, Any], bytes]) -> None:
    text = json.dumps(content[0]).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[1])


@_kind
def paths(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Things in the place of a file that are no files."""

    def link(target: str) -> Make:
        return lambda path: path.symlink_to(target)

    things: dict[str, Make] = {
        "a folder": Path.mkdir,
        "a pipe": os.mkfifo,
        "a link to zeros": link("/dev/zero"),
        "a link to nothing": link("nothing"),
        "a link to the weights": link(WEIGHTS),
        "a link to the terminal": link("/dev/tty"),
        "an empty file": Path.touch,
        "an unreadable file": lambda path: path.touch(0),
    }
    for file, ways in (
        (WEIGHTS, (*LOADS[:3], "transformers", "inspect")),
        (CONFIG, (*LOADS[:3], "transformers", "inspect")),
        (TICKET, ("ticket",)),
        (SEARCH, ("search",)),
    ):
        for name, thing in things.items():

            def make(folder: Path, file: str = file, thing: Make = thing) -> None:
                (folder / file).unlink(missing_ok=True)
                thing(folder / file)

            yield Attack("paths", f"{file}: {name}", make, ways)


# 4. Sealed shapes, random damage by other ways in, and the file of a search


@_kind
def shapes(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Shapes in the seal that no parameter has."""
    values = {
        "Infinity": "[Infinity, 8]",
        "-Infinity": "[-Infinity]",
        "NaN": "[NaN, 8]",
        "negative": "[-32, -8]",
        "float": "[32.5, 8]",
        "text": '["32", "8"]',
        "true": "[true, true]",
        "null": "null",
        "a number": "32",
        "empty": "[]",
        "zero": "[0, 8]",
        "huge": "[4611686018427387904, 4611686018427387904]",
        "many": "[" + ", ".join(["1"] * 100_000) + "]",
        "nested": "[[32], [8]]",
        "an object": '{"32": 8}',
        "1e400": "[1e400, 8]",
    }
    for name, value in values.items():

        def make(folder: Path, value: str = value) -> None:
            parts = Parts(folder)
            right = json.dumps(parts.name) + ": " + json.dumps(list(parts.shapes[parts.name]))
            parts.write_seal(lambda text: text.replace(right, f"{json.dumps(parts.name)}: {value}"))

        for source in ("elements", "rows"):
            ways = ("from_pretrained", "inspect", "diff", "transformers")
            yield Attack("shapes", f"{name} ({source})", make, ways, source=source)
    for name, value in {"Infinity": "Infinity", "a list": "[]", "null": "null", "text": '"a"'}.items():

        def whole(folder: Path, value: str = value) -> None:
            Parts(folder).write_seal(lambda text: text[: text.rindex('"shapes"')] + f'"shapes": {value}}}')

        yield Attack("shapes", f"all are {name}", whole, ("from_pretrained", "inspect"))


@_kind
def ways(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Random damage, loaded by the other ways in and by the command."""
    names = ("load_adapter", "hotswap", "transformers", "auto", "verify", "inspect", "diff", "merge", "state_dict")
    for case in range(min(count, 500)):
        rng = random.Random(f"{seed} ways {case}")
        kind, way, source = rng.choice(sorted(CHANGES)), rng.choice(names), rng.choice(sorted(world.sources))

        def make(folder: Path, rng: random.Random = rng, kind: str = kind, case: int = case) -> None:
            torch.manual_seed(case)
            CHANGES[kind](folder, rng)

        yield Attack("ways", f"{kind} {case}", make, (way,), source=source)


@_kind
def search(world: World, seed: int, count: int) -> Iterator[Attack]:
    """Damage to the file from which a search resumes."""

    def with_metadata(**changes: Any) -> Make:
        def make(folder: Path) -> None:
            with safe_open(world.search_file, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            metadata |= {name: value for name, value in changes.items() if isinstance(value, str)}
            change = changes.get("change")
            save_file(tensors if change is None else change(tensors), folder / SEARCH, metadata)

        return make

    def changed(function: Callable[[Tensor], Tensor], part: str) -> Make:
        def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            key = next(name for name in sorted(tensors) if part in name)
            return {**tensors, key: function(tensors[key]).contiguous()}

        return with_metadata(change=change)

    named = {
        "losses: a number": with_metadata(losses="1"),
        "losses: null": with_metadata(losses="null"),
        "losses: text": with_metadata(losses='["a"]'),
        "losses: too many": with_metadata(losses=json.dumps([0.5] * 1000)),
        "losses: nan": with_metadata(losses="[NaN]"),
        "losses: deep": with_metadata(losses="[" * 100_000 + "]" * 100_000),
        "settings: a list": with_metadata(settings="[]"),
        "settings: deep": with_metadata(settings="[" * 100_000),
        "no tensors": with_metadata(change=lambda tensors: {}),
        "more tensors": with_metadata(change=lambda tensors: {**tensors, "more": torch.ones(3)}),
    }
    for part in ("called", "buffer:", ""):
        named[f"a tensor that is too short: {part}"] = changed(lambda t: t.reshape(-1)[:1], part)
        named[f"a tensor of another dtype: {part}"] = changed(lambda t: t.to(torch.complex64), part)
        named[f"a tensor without elements: {part}"] = changed(lambda t: t.reshape(-1)[:0], part)
    for name, make in named.items():
        yield Attack("search", name, make, ("search",))

    def damage(folder: Path, case: int) -> None:
        rng = random.Random(f"{seed} search {case}")
        data = bytearray(world.search_file.read_bytes())
        at = rng.randrange(min(len(data), 8000) if rng.random() < 0.7 else len(data))
        kind = rng.randrange(3)
        if kind == 0:
            for _ in range(rng.randint(1, 8)):
                data[(at + rng.randrange(64)) % len(data)] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[at:]
        else:
            other = rng.randrange(len(data) - 16)
            data[at : at + 16] = data[other : other + 16]
        (folder / SEARCH).write_bytes(bytes(data))

    for case in range(min(count, 500)):
        yield Attack("search", f"damage {case}", partial(damage, case=case), ("search",))
