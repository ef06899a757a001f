"""Prints what PEFT's LoRA does, as JSON: `python lora_alone.py FOLDER [sfa]`, with `sfa` after importing sfa_peft."""

import json
import shutil
import sys
import warnings
from pathlib import Path

import peft
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

if sys.argv[2:] == ["sfa"]:
    import sfa_peft  # noqa: F401

warnings.simplefilter("ignore")
FOLDER = Path(sys.argv[1])
WEIGHTS = "adapter_model.safetensors"
read: list[str] = []


def count_configs():
    original = PeftConfig.from_json_file.__func__

    def from_json_file(cls, path, **kwargs):
        read.append(Path(path).parent.name)
        return original(cls, path, **kwargs)

    PeftConfig.from_json_file = classmethod(from_json_file)


def base():
    torch.manual_seed(0)
    return ViTModel(
        ViTConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=8, patch_size=4, intermediate_size=8
        )
    ).eval()


def adapter(name, rank=2):
    torch.manual_seed(1)
    config = LoraConfig(target_modules=["q_proj"], r=rank, init_lora_weights=False)
    get_peft_model(base(), config).save_pretrained(FOLDER / name)
    return FOLDER / name


def state(model):
    with torch.no_grad():
        output = model(torch.ones(1, 3, 8, 8)).last_hidden_state.double().sum().item()
    return {
        "trainable": sorted(name for name, p in model.named_parameters() if p.requires_grad),
        "modules": [type(module).__name__ for module in model.modules()],
        "configs": sorted(getattr(model, "peft_config", {})),
        "output": output,
    }


def outcome(model, load):
    """What a way to load does to a model: what it gives or raises, what it reads, and how the model is afterwards."""
    read.clear()
    try:
        loaded = load(model)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}", "read": list(read)} | state(model)
    return {"read": list(read)} | state(loaded if isinstance(loaded, PeftModel) else model)


good, other = adapter("good"), adapter("other", rank=4)
of_other_shapes = FOLDER / "of_other_shapes"
shutil.copytree(good, of_other_shapes)
tensors = load_file(good / WEIGHTS)
save_file({key: tensor[:, :1].contiguous() for key, tensor in tensors.items()}, of_other_shapes / WEIGHTS)
broken = FOLDER / "broken"
shutil.copytree(good, broken)
(broken / "adapter_config.json").write_text("{")
headless = FOLDER / "headless"
get_peft_model(base(), LoraConfig(target_modules=["q_proj"], modules_to_save=["layernorm"])).save_pretrained(headless)
save_file({k: t for k, t in load_file(headless / WEIGHTS).items() if "lora" in k}, headless / WEIGHTS)

count_configs()
results = {}
for folder in (good, of_other_shapes, broken, headless, FOLDER / "missing"):
    path = str(folder)
    results[f"from_pretrained {folder.name}"] = outcome(
        base(), lambda m, path=path: PeftModel.from_pretrained(m, path)
    )
    results[f"transformers {folder.name}"] = outcome(base(), lambda m, path=path: m.load_adapter(path))
    second = PeftModel.from_pretrained(base(), str(good))
    results[f"load_adapter {folder.name}"] = outcome(second, lambda m, path=path: m.load_adapter(path, "second"))
    swapped = PeftModel.from_pretrained(base(), str(good))
    results[f"hotswap {folder.name}"] = outcome(
        swapped, lambda m, path=path: hotswap_adapter(m, path, adapter_name="default", torch_device="cpu")
    )
results["config given"] = outcome(
    base(), lambda m: PeftModel.from_pretrained(m, str(good), config=PeftConfig.from_pretrained(str(good)))
)
results["wrong arguments"] = outcome(base(), lambda m: PeftModel.from_pretrained(m))
results["wrong keyword"] = outcome(base(), lambda m: m.load_adapter(str(good), peft_model_id=str(good)))
print(json.dumps({"peft": peft.__version__, "results": results}).replace(str(FOLDER), "FOLDER"))
