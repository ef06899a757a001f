"""The ways to fine-tune that can be compared, each with the same number of trained backbone parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from sfa_peft import SFAConfig

from models import backbone_parameters

HEADS = ["decode_head"]
METHODS = ("sfa", "lora", "full", "head")


@dataclass(frozen=True)
class Rates:
    """Learning rates: of what is trained in the backbone, and of the head.

    Attributes:
        backbone: Adapters, or the whole backbone. For SFA, of the external adapters.
        internal: For SFA, of the internal values.
        head: Of the head.
    """

    backbone: float
    head: float
    internal: float = 0.0


RATES = {
    "sfa": Rates(backbone=1e-2, internal=1.2e-2, head=2e-3),
    "lora": Rates(backbone=5e-3, head=2e-3),
    "full": Rates(backbone=5e-4, head=2e-3),
    "head": Rates(backbone=0.0, head=2e-3),
}


def adapt(model: nn.Module, method: str, budget: float, external_share: float | None = None) -> nn.Module:
    """Make `model` ready for a method: freeze what it freezes, add what it adds.

    `external_share` is `SFAConfig`'s, for ablations; its default unless given.
    """
    if method == "full":
        return model
    if method == "head":
        model.backbone.requires_grad_(False)
        return model
    if method == "lora":
        return get_peft_model(model, lora_config(model, int(budget * backbone_parameters(model))))
    share = {} if external_share is None else {"external_share": external_share}
    return get_peft_model(model, SFAConfig(budget=budget, modules_to_save=HEADS, **share))


def lora_config(model: nn.Module, budget: int) -> LoraConfig:
    """LoRA on every linear layer of the backbone, with the ranks that come closest to the budget from below."""
    linears = {
        name: module.in_features + module.out_features
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.startswith("backbone.")
    }
    rank = budget // sum(linears.values())
    left = budget - rank * sum(linears.values())
    larger = {}
    for name, cost in linears.items():
        if cost <= left:
            larger[name] = rank + 1
            left -= cost
    if rank == 0:
        linears = {name: linears[name] for name in larger}
        rank, larger = 1, {}
    if not linears:
        raise ValueError(f"a budget of {budget} parameters does not pay for LoRA of rank 1 on one layer")
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=larger,
        alpha_pattern=larger,
        target_modules=list(linears),
        modules_to_save=HEADS,
    )


def optimizer_for(model: nn.Module, method: str, rates: Rates) -> torch.optim.AdamW:
    """AdamW with a group for each learning rate; weight decay on the fully trained backbone alone."""
    groups: dict[str, list[nn.Parameter]] = {"head": [], "backbone": [], "internal": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "head" if "decode_head" in name else "internal" if ".sfa_internal." in name else "backbone"
            groups[kind].append(p)
    decay = 0.01 if method == "full" else 0.0
    return torch.optim.AdamW(
        [
            {"params": parameters, "lr": getattr(rates, kind), "weight_decay": decay if kind == "backbone" else 0.0}
            for kind, parameters in groups.items()
            if parameters
        ]
    )


def trained_backbone_parameters(model: nn.Module) -> int:
    """Trained parameters outside the head."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and "decode_head" not in n)


def is_adapter(model: nn.Module) -> bool:
    return isinstance(model, PeftModel)
