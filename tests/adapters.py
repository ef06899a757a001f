"""Tiny models with an adapter: made, searched, trained, and what is in them."""

import torch
from peft import get_peft_model

import tiny
from sfa_peft import SFAConfig, SFALayer, search_ticket

BATCHES = [tiny.batch(seed=i) for i in range(3)]


def adapted(make=tiny.swin, **options):
    return get_peft_model(make(), SFAConfig(**{"budget": 0.1, "modules_to_save": ["decode_head"]} | options))


def in_eval(**options):
    """An adapted model whose head's batch norm does not see how a batch is split."""
    torch.manual_seed(0)
    return adapted(**options).eval()


def auto(**options):
    return adapted(**{"external_placement": "auto", "external_share": 0.4, "budget": 0.2} | options)


def search(model, data=BATCHES, **options):
    return search_ticket(model, data, **{"steps": 4, "progress": False} | options)


def trained(seed=0, steps=2, make=tiny.swin, searched=True, **options):
    model = adapted(make, **options)
    if searched:
        search(model, [tiny.batch(seed=seed)], steps=2, seed=seed)
    return tiny.train(model, steps)


def train_on(model, batches, backward=torch.Tensor.backward, make=torch.optim.AdamW, **options):
    optimizer = make([p for p in model.parameters() if p.requires_grad], lr=1e-2, **options)
    for batch in batches:
        backward(model(batch["pixel_values"]).logits.square().mean())
        optimizer.step()
        optimizer.zero_grad()


def checkpoint_activations(backbone):
    renamed = hasattr(backbone, "activation_checkpointing_enable")  # not in the oldest transformers
    enable = backbone.activation_checkpointing_enable if renamed else backbone.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def disturb(model, adapter):
    """Give an adapter values as if it were trained."""
    generator = torch.Generator().manual_seed(len(adapter))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}." in name:
                p.add_(torch.randn(p.shape, generator=generator).mul(0.1))


def positions(model, adapter="default"):
    return {
        f"{n}.{p}": m.sfa_internal[adapter].positions(p)
        for n, m in model.named_modules()
        if isinstance(m, SFALayer) and adapter in m.sfa_internal
        for p in m.sfa_internal[adapter].changed
    }


def flat(report):
    return {f"{m}.{p}": t for m, own in report.ticket.positions.items() for p, t in own.items()}


def alone(model, adapter, x):
    """What a model gives with one of its adapters, or with none of them."""
    if adapter == "__base__":
        with model.disable_adapter():
            return tiny.output(model, x)
    model.set_adapter(adapter)
    return tiny.output(model, x)
