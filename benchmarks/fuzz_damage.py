"""Random damage to saved adapters: bytes changed, config fields changed, and files forged as a whole."""

from __future__ import annotations

import copy
import json
import random
import shutil
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from sfa_peft import SFAConfig
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


def save_adapter(folder: Path, base_name: str = "", **options: Any) -> dict[str, Tensor]:
    """Save an adapter with random values for the base of this name; give its tensors."""
    base = make_base()
    base.name_or_path = base_name
    config = SFAConfig(budget=0.1, modules_to_save=["classifier"], init_weights=False, external_share=0.4, **options)
    model = get_peft_model(base, config)
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


def copied(source: Path, folder: Path) -> Path:
    """A copy of the two files of an adapter in a new folder."""
    folder.mkdir(parents=True)
    for file in (CONFIG, WEIGHTS):
        shutil.copy(source / file, folder / file)
    return folder
