"""Run by torchrun: trains an adapter on this process's half of each batch, and saves it."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from peft import get_peft_model_state_dict
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers.models.swin.modeling_swin import SwinLayer

import tiny
from adapters import in_eval, train_on

way, folder = sys.argv[1], Path(sys.argv[2])
accelerator = Accelerator(cpu=True)
rank = accelerator.process_index


def half(batch):
    return {key: value[2 * rank : 2 * rank + 2] for key, value in batch.items()}


model = in_eval()
if way == "ddp":
    model = accelerator.prepare(model)
    assert not [name for name in model.named_module_buffers if "_positions" in name]
else:
    mesh = init_device_mesh("cpu", (2,))
    for module in (*(m for m in model.modules() if isinstance(m, SwinLayer)), model):
        fully_shard(module, mesh=mesh)
    assert sum(p.to_local().numel() for p in model.parameters()) < 0.6 * sum(p.numel() for p in model.parameters())
train_on(model, [half(tiny.batch(4, seed=step)) for step in range(3)], accelerator.backward)
if way == "ddp":
    state = accelerator.get_state_dict(model)
    model = accelerator.unwrap_model(model)
else:
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
if accelerator.is_main_process:
    torch.save(get_peft_model_state_dict(model, state_dict=state), folder / "state.pt")
    model.save_pretrained(folder / "adapter", state_dict=state)
# Otherwise a process may end while threads of the mesh's groups still run, and abort.
accelerator.wait_for_everyone()
torch.distributed.destroy_process_group()
