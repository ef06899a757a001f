"""Writes the golden files of a format version: once, when the version is made. They are never written again.

python tests/golden/write.py tests/golden/v1
"""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny
from sfa_peft import SFAConfig, ticket_of

ADAPTERS = {
    "elements": {"values_dtype": "bfloat16", "heads_dtype": "float16", "modules_to_save": ["classifier"]},
    "rows": {"internal_granularity": "row", "external_share": 0.0, "budget": 0.1},
    "columns": {"internal_granularity": "column", "external_places": ["attention", "mlp"]},
    "external": {"external_share": 1.0, "external_activation": "silu", "external_scale": 0.5},
    "dense": {"budget": None, "internal_density": 0.9, "target_modules": ["layernorm_before", "downsample.reduction"]},
    "head": {"target_heads": ["decode_head"], "modules_to_save": ["batch_norm"]},
}


def write(folder: Path) -> None:
    for name, options in ADAPTERS.items():
        torch.manual_seed(len(name))
        config = SFAConfig(**{"budget": 0.04, "initial_ticket": "random", "init_weights": False} | options)
        model = get_peft_model(tiny.swin(), config)
        model.save_pretrained(folder / name)
        (folder / name / "ticket.png").unlink()
        (folder / name / "README.md").unlink()
        expected = {
            key: {"values": tensor.float().flatten().tolist()}
            if tensor.is_floating_point()
            else {"positions": tensor.tolist()}
            for key, tensor in model.state_dict().items()
            if ".sfa_" in key or ".modules_to_save." in key
        }
        (folder / name / "expected.json").write_text(json.dumps(expected))
        if name == "rows":
            ticket_of(model).save(folder / "ticket.safetensors")
            positions = {parameter: own.tolist() for parameter, own in ticket_of(model).by_name().items()}
            (folder / "ticket.json").write_text(json.dumps(positions))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
