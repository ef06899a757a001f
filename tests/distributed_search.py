"""Run by torchrun: searches tickets on this process's half of the data and saves them."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

import tiny
from adapters import adapted, auto, positions, search
from sfa_peft import TicketSearchError


def backbone_loss(model, batch):
    """Without the head's batch norm, which sees each process's half alone, gradients are the same mean."""
    return model.base_model.model.backbone(batch["pixel_values"]).feature_maps[0].square().mean()


accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
folder = Path(sys.argv[1])
torch.manual_seed(rank)  # heads made with different seeds must not matter
data = [tiny.batch(seed=2 * i + rank) for i in range(2)]

model = adapted()
search(model, data, accelerator=accelerator, loss_fn=backbone_loss)
torch.save(positions(model), folder / f"rank{rank}.pt")

# Whoever is asked to save, only the main process writes.
model.save_pretrained(folder / f"saved{rank}")
model.save_pretrained(folder / "saved")

# Everything that ranks could disagree on: rounds, widths, values to begin with. Stopped once and resumed.
model = auto(external_places=["attention", "mlp", "mlp_parallel", "block"])
options = {"accelerator": accelerator, "rounds": 2, "steps": 3, "rewind": False, "criterion": "credit"}
file = folder / "progress.safetensors"
calls = []


def stops(model, batch):
    calls.append(0)
    if len(calls) > 4:
        raise RuntimeError("stopped")
    return backbone_loss(model, batch)


with suppress(RuntimeError):
    search(model, data, loss_fn=stops, checkpoint=file, checkpoint_every=2, **options)
assert len(calls) == 5
accelerator.wait_for_everyone()
search(model, data, loss_fn=backbone_loss, checkpoint=file, checkpoint_every=2, **options)
adapter = {n: t for n, t in model.state_dict().items() if ".sfa_" in n}
torch.save(adapter, folder / f"auto{rank}.pt")


# An error on one process ends the search on all.
def fails_on_one(model, batch):
    if rank == 1:
        raise ValueError("no loss here")
    return backbone_loss(model, batch)


try:
    search(adapted(), data, accelerator=accelerator, loss_fn=fails_on_one)
except (ValueError, TicketSearchError) as error:
    (folder / f"error{rank}.json").write_text(json.dumps(f"{type(error).__name__}: {error}"))
