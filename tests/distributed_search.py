"""Run by torchrun: searches a ticket on this process's half of the data and saves it."""

import sys

import torch
from accelerate import Accelerator

import tiny
from test_search import adapted, backbone_loss, positions, search

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
torch.manual_seed(rank)  # heads made with different seeds must not matter
model = adapted()
data = [tiny.batch(seed=2 * i + rank) for i in range(2)]
search(
    model,
    data,
    accelerator=accelerator,
    loss_fn=backbone_loss,
)
torch.save(positions(model), f"{sys.argv[1]}/rank{rank}.pt")
