"""The ways to fine-tune that can be compared, each with the same number of trained backbone parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, ShiraConfig, get_peft_model
from torch import nn

from sfa_peft import SFAConfig, parameter_groups

from .models import count_parameters


@dataclass(frozen=True)
class Rates:
    """Learning rates: of what is trained in the backbone, and of the head.

    Attributes:
        backbone: Adapters, or the whole backbone. For SFA, of the external adapters.
        internal: For SFA, of the internal values. None for that of `parameter_groups`.
        head: Of the head.
    """

    backbone: float
    head: float
    internal: float | None = None


@dataclass(frozen=True)
class Dense:
    """A dense model, where its backbone is and what its heads are.

    Attributes:
        model: The model.
        backbone: The name of the backbone in it.
        heads: The names of the heads.
    """

    model: nn.Module
    backbone: str
    heads: Sequence[str]

    @property
    def backbone_parameters(self) -> int:
        return count_parameters(self.model.get_submodule(self.backbone))

    def linears(self) -> dict[str, nn.Linear]:
        """The linear layers of the backbone."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and name.startswith(f"{self.backbone}.")
        }


def lora_config(dense: Dense, budget: int) -> LoraConfig:
    """LoRA on every linear layer of the backbone, with the ranks that come closest to the budget from below.

    Raises:
        ValueError: If the budget does not pay for one rank of one layer.
    """
    costs = {name: linear.in_features + linear.out_features for name, linear in dense.linears().items()}
    rank, left = divmod(budget, sum(costs.values()))
    larger = {}
    # Where one rank is too much for all layers, the last ones get it: the first ones measured two points worse.
    for name in costs if rank else reversed(costs):
        if costs[name] <= left:
            larger[name] = rank + 1
            left -= costs[name]
    if rank == 0:
        costs = {name: costs[name] for name in larger}
        rank, larger = 1, {}
    if not costs:
        raise ValueError(f"a budget of {budget} parameters does not pay for LoRA of rank 1 on one layer")
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=larger,
        alpha_pattern=larger,
        target_modules=list(costs),
    )


def shira_config(dense: Dense, budget: int, seed: int = 0) -> ShiraConfig:
    """SHiRA on the linear layers of the backbone: the largest rank that fits, on as many layers as the rest pays for.

    SHiRA has one rank for all its layers; so that the budget is used, the rank is raised by one where leaving out a
    few layers makes room for it.

    Raises:
        ValueError: If the budget does not pay for one rank of one layer.
    """
    costs = {name: linear.in_features + linear.out_features for name, linear in dense.linears().items()}
    low = budget // sum(costs.values())
    choices = []
    for rank in (low, low + 1):
        if rank:
            own, total = [], 0
            for name, cost in costs.items():
                if total + rank * cost <= budget:
                    own.append(name)
                    total += rank * cost
            choices.append((total, rank, own))
    total, rank, own = max(choices)
    if not own:
        raise ValueError(f"a budget of {budget} parameters does not pay for SHiRA of rank 1 on one layer")
    return ShiraConfig(r=rank, random_seed=seed, target_modules=own)


def adaptformer_config(dense: Dense, budget: int) -> SFAConfig:
    """AdaptFormer (Chen et al., 2022): bottlenecks with ReLU beside every MLP, what they add scaled by 0.1."""
    return SFAConfig(
        budget=budget,
        target_modules=[],
        external_places=("mlp_parallel",),
        external_activation="relu",
        external_scale=0.1,
        external_conv=0,
        modules_to_save=list(dense.heads),
    )


def sfa_config(dense: Dense, budget: int, **options: Any) -> SFAConfig:
    """SFA with its defaults; `options` are other fields."""
    return SFAConfig(budget=budget, modules_to_save=list(dense.heads), **options)


@dataclass(frozen=True)
class Method:
    """A way to fine-tune.

    Attributes:
        rates: Learning rates, measured best for segmentation.
        config: The PEFT config for a model and a budget; None without an adapter.
        trains_backbone: Whether the backbone itself is trained, as far as there is no adapter.
        is_sfa: Whether its adapter is one of SFA.
    """

    rates: Rates
    config: Callable[..., PeftConfig] | None = None
    trains_backbone: bool = False
    is_sfa: bool = False


METHODS = {
    "sfa": Method(Rates(backbone=1e-2, head=2e-3), sfa_config, is_sfa=True),
    "lora": Method(Rates(backbone=5e-3, head=2e-3), lora_config),
    "shira": Method(Rates(backbone=1.2e-2, head=2e-3), shira_config),
    "adaptformer": Method(Rates(backbone=1e-2, head=2e-3), adaptformer_config, is_sfa=True),
    "full": Method(Rates(backbone=5e-4, head=2e-3), trains_backbone=True),
    "head": Method(Rates(backbone=0.0, head=2e-3)),
}


def adapt(dense: Dense, method: str, budget: float, **options: Any) -> nn.Module:
    """Make a model ready for a method: freeze what it freezes, add what it adds.

    Args:
        dense: The model.
        method: Of `METHODS`.
        budget: The fraction of the backbone that may be trained.
        options: More fields of the method's config.

    Raises:
        ValueError: If the budget does not pay for the method's smallest adapter.
    """
    make = METHODS[method].config
    if make is None:
        dense.model.get_submodule(dense.backbone).requires_grad_(METHODS[method].trains_backbone)
        return dense.model
    config = make(dense, int(budget * dense.backbone_parameters), **options)
    model = get_peft_model(dense.model, config)
    if not config.modules_to_save:
        # PEFT takes names in modules_to_save as endings, and wraps too much of DPT and RF-DETR.
        for head in dense.heads:
            dense.model.get_submodule(head).requires_grad_(True)
    return model


def is_head(name: str, heads: Sequence[str]) -> bool:
    """Whether a parameter of an adapted model, or of a plain one, belongs to a head."""
    return name.removeprefix("base_model.model.").startswith(tuple(f"{head}." for head in heads))


def optimizer_for(model: nn.Module, heads: Sequence[str], rates: Rates, decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW with a group for each learning rate; weight decay on what is trained in the backbone alone."""
    if is_adapter(model) and isinstance(model.active_peft_config, SFAConfig):
        groups = parameter_groups(model, internal=rates.internal, external=rates.backbone, head=rates.head)
        return torch.optim.AdamW(groups)
    trained = [(is_head(name, heads), p) for name, p in model.named_parameters() if p.requires_grad]
    kinds = (
        {"params": [p for of_head, p in trained if of_head], "lr": rates.head, "weight_decay": 0.0},
        {"params": [p for of_head, p in trained if not of_head], "lr": rates.backbone, "weight_decay": decay},
    )
    return torch.optim.AdamW([group for group in kinds if group["params"]])


def trained_backbone_parameters(model: nn.Module, heads: Sequence[str]) -> int:
    """Trained parameters outside the heads."""
    return sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and not is_head(n, heads))


def is_adapter(model: nn.Module) -> bool:
    return isinstance(model, PeftModel)
