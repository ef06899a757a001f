"""SFAConfig: the fields of the method, their defaults, and their checks."""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any, cast

import torch
from peft.config import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import PeftType

from .layers.bottleneck import ACTIVATIONS
from .layers.granularity import GRANULARITIES, Granularity
from .ticket.criteria import DATA_FREE

PLACES = ("attention", "mlp", "mlp_parallel", "block")
PLACEMENTS = ("uniform", "auto")
DEFAULT_BUDGET = 0.02
DEFAULT_SHARE = 0.5
DEFAULT_CONV, MAX_CONV = 7, 31
# The fields that may be regular expressions.
PATTERN_FIELDS = ("target_modules", "exclude_modules", "external_modules")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_int(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_int(value) or (isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value))


@dataclass
class SFAConfig(PeftConfig):
    """Configuration of Selective Feature Adapters (Deng et al., arXiv 2310.01843).

    Give either `budget`, which decides the widths and the ticket size, or `external_width` and `internal_density`,
    which decide the number of parameters. If none of the three is given, `budget` is 0.02.

    Args:
        budget (`int` or `float`, *optional*, defaults to `None`):
            The number of trainable adapter parameters: an int of at least 1, or a fraction in (0, 1) of the backbone's
            parameters (the base model without `modules_to_save`). It is never exceeded. With internal adapters and
            `element` granularity it is met exactly.
        external_share (`float`, defaults to 0.5):
            The largest fraction of the budget for external adapters, in [0, 1]. The ticket gets the rest. With 1 there
            are only external adapters, with 0 only internal ones. If one kind is switched off
            (`external_places=()` or `external_modules=[]`, `target_modules=[]`), the other gets the whole budget.
        external_places (`tuple[str]`, *optional*, defaults to `None`):
            The places of external adapters in known architectures: `block` (on the block's output), `attention` (on
            the attention output), `mlp` (on the MLP output) or `mlp_parallel` (from the MLP input, added to the MLP
            output). `()` for none. None means `block` if the adapters have filters there, otherwise `mlp_parallel`,
            which `merge_and_unload` can fold into the MLP.
        external_placement (`str`, defaults to `"uniform"`):
            How the external adapters' part of the budget is distributed. `uniform`: the same fraction of the channel
            width at every place. `auto` (experimental, no gain was measured): `search_ticket` chooses the places and
            widths, and until then they are uniform. `auto` needs a budget.
        external_modules (`list[str]`, `str` or `dict`, *optional*, defaults to `None`):
            The modules whose output gets an external adapter, instead of `external_places`: a list of name endings or
            a regular expression, as in `target_modules`. They must be leaves. `[]` for none. A dict also says what the
            adapters read: from name endings of such modules to the module whose *input* it is, such as
            ``{"mlp.fc2": "mlp"}`` for the place of `mlp_parallel`, or None for the output itself. The name of that
            module is looked up beside the output module, then in the modules around it.
        external_width (`int`, `float` or `dict`, *optional*, defaults to `None`):
            The width of external adapters if no budget is given: a number of hidden units, a fraction in [0, 1] of
            the place's channel width, or a dict from patterns of module names (as in `rank_pattern`) to these. 0 for
            none.
        external_activation (`str`, defaults to `"gelu"`):
            The activation function of external adapters: `gelu`, `relu`, `silu`, `tanh` or `identity`.
        external_dropout (`float`, defaults to 0.0):
            The dropout probability of the hidden units of external adapters, in [0, 1).
        external_scale (`float`, defaults to 1.0):
            The constant factor on the output of external adapters. Any finite number except 0.
        external_conv (`int`, *optional*, defaults to `None`):
            The height and width of a depthwise filter on each hidden unit of external adapters: an odd number such as
            7, or 0 for no filters. With filters, an external adapter sees the neighbours of a token; merging cannot
            fold it into the MLP. Filters need the grid of the tokens: docs/architectures.md says where it is known.
            None means 7 if it is known at all places of `external_places`, otherwise 0. Not with
            `external_placement="auto"`.
        target_modules (`list[str]` or `str`, *optional*, defaults to `None`):
            The modules whose weights and biases the ticket may choose from (`nn.Linear`, `nn.Conv2d`,
            `nn.LayerNorm`): a list of name endings, a regular expression or `"all-linear"`. None selects the known
            modules of the backbone's architecture. `[]` for none.
        exclude_modules (`list[str]` or `str`, *optional*, defaults to `None`):
            The modules that get no adapter of any kind: a list of name endings or a regular expression.
        modules_to_save (`list[str]`, *optional*, defaults to `None`):
            The heads: modules that are trained whole, saved with the adapter, and not counted in the budget.
        layers_to_transform (`int` or `list[int]`, *optional*, defaults to `None`):
            The indices of the layers that get adapters. None selects all layers.
        layers_pattern (`str` or `list[str]`, *optional*, defaults to `None`):
            The name before the layer index, if it is not a common one. Needs `layers_to_transform`.
        internal_density (`float`, *optional*, defaults to `None`):
            The density of the ticket if no budget is given: the fraction of the target parameters, in [0, 1]. 0 for
            none.
        internal_granularity (`str`, defaults to `"element"`):
            The unit of selection: `element`, `row` (one output neuron with its bias) or `column` (one input of all
            neurons).
        initial_ticket (`str`, defaults to `"magnitude"`):
            The criterion of the data-free ticket that `get_peft_model` installs: `magnitude` or `random`.
        ticket_seed (`int`, defaults to 0):
            The seed of a random initial ticket.
        init_weights (`bool`, defaults to `True`):
            Whether the adapted model starts with the same outputs as the base model. With False the adapters start
            with random values (for tests).
        target_heads (`list[str]`, *optional*, defaults to `None`):
            Modules outside the known backbone, such as a *pretrained* decode head. The ticket may also choose from
            their `nn.Linear`, `nn.Conv2d` and `nn.LayerNorm` leaves. Only with `target_modules=None`. A new head
            belongs in `modules_to_save`; the two fields may name different parts of one head.
        values_dtype (`str`, *optional*, defaults to `None`):
            The dtype of internal values and external adapters in a saved file: `float32`, `bfloat16` or `float16`.
            None keeps the dtype of training. The model itself does not change, and values are loaded in its dtype.
        heads_dtype (`str`, *optional*, defaults to `None`):
            The dtype of heads in a saved file, as `values_dtype`.
        keep_weights (`bool`, *optional*, defaults to `None`):
            Whether to keep the changed weights between forward passes instead of computing them in each. True gives
            the fastest passes, at the cost of a copy of the adapted weights; False needs the least memory. None keeps
            them under autocast, where they take the place of the casts that autocast makes. The outputs are the same.
            With several adapters, the last one decides.

    Raises:
        ValueError: If a value is not valid, or two fields contradict each other. The message names the field, the
            value and what is allowed.
    """

    budget: int | float | None = field(
        default=None,
        metadata={"help": "Number of trainable adapter parameters: an int, or a fraction of the backbone in (0, 1)."},
    )
    external_share: float = field(
        default=DEFAULT_SHARE, metadata={"help": "Largest fraction of the budget for external adapters, in [0, 1]."}
    )
    external_places: tuple[str, ...] | list[str] | None = field(
        default=None,
        metadata={"help": f"Places of external adapters, from {PLACES}; None: block with filters, or mlp_parallel."},
    )
    external_placement: str = field(
        default="uniform",
        metadata={"help": f"How the external share is distributed over the places, one of {PLACEMENTS}."},
    )
    external_modules: list[str] | str | set[str] | dict[str, str | None] | None = field(
        default=None,
        metadata={
            "help": "Leaves whose output gets an external adapter, instead of `external_places`; [] for none. A dict "
            "also names the modules whose input the adapters read."
        },
    )
    external_width: int | float | dict[str, int | float] | None = field(
        default=None,
        metadata={
            "help": "Width of external adapters if no budget is given: an int, a fraction, or a dict; 0 for none."
        },
    )
    external_activation: str = field(
        default="gelu", metadata={"help": f"Activation of external adapters, one of {sorted(ACTIVATIONS)}."}
    )
    external_dropout: float = field(default=0.0, metadata={"help": "Dropout probability of hidden units, in [0, 1)."})
    external_scale: float = field(default=1.0, metadata={"help": "Factor on the output of external adapters, not 0."})
    external_conv: int | None = field(
        default=None,
        metadata={"help": "Size of a depthwise filter on each hidden unit, odd; 0 for none; None: 7 where possible."},
    )
    target_modules: list[str] | str | set[str] | None = field(
        default=None,
        metadata={"help": "Modules that the ticket may choose from; None: those of the architecture; [] for none."},
    )
    exclude_modules: list[str] | str | set[str] | None = field(
        default=None,
        metadata={"help": "Modules that get no adapter of any kind: name endings or a regular expression."},
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Heads: trained whole, saved with the adapter, not counted in the budget."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the layers that get adapters; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name before the layer index; needs `layers_to_transform`."}
    )
    internal_density: float | None = field(
        default=None, metadata={"help": "Density of the ticket if no budget is given, in [0, 1]; 0 for none."}
    )
    internal_granularity: str = field(
        default="element", metadata={"help": f"Unit of selection, one of {sorted(GRANULARITIES)}."}
    )
    initial_ticket: str = field(
        default="magnitude",
        metadata={"help": f"Criterion of the data-free ticket at injection, one of {DATA_FREE}."},
    )
    ticket_seed: int = field(default=0, metadata={"help": "Seed of a random initial ticket."})
    init_weights: bool = field(default=True, metadata={"help": "Whether to start with the base model's outputs."})
    target_heads: list[str] | None = field(
        default=None, metadata={"help": "Pretrained heads that the ticket may also choose from."}
    )
    values_dtype: str | None = field(
        default=None,
        metadata={"help": f"Dtype of adapter values in a file, one of {sorted(DTYPES)}; None: as trained."},
    )
    heads_dtype: str | None = field(
        default=None, metadata={"help": f"Dtype of heads in a file, one of {sorted(DTYPES)}; None: as trained."}
    )
    keep_weights: bool | None = field(
        default=None,
        metadata={"help": "Keep the changed weights between forward passes: True, False, or None: under autocast."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("SFA")
        if isinstance(self.external_places, list):
            self.external_places = tuple(self.external_places)
        for name in PATTERN_FIELDS:
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                setattr(self, name, set(value))
        if self.external_modules == {}:
            self.external_modules = set()
        self._validate()
        if self.budget is not None:  # a NumPy scalar is valid, but cannot be saved as JSON
            self.budget = int(self.budget) if is_int(self.budget) else float(self.budget)
        if self.external_conv is not None:
            self.external_conv = int(self.external_conv)
        if self.budget is None and self.external_width is None and self.internal_density is None:
            self.budget = DEFAULT_BUDGET

    @property
    def uses_budget(self) -> bool:
        """Whether the sizes follow from `budget`."""
        return self.budget is not None

    @property
    def granularity(self) -> Granularity:
        """The unit of selection as an object."""
        return GRANULARITIES[self.internal_granularity]

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict. Sets become sorted lists, so that the same config always gives the same file."""
        fields = super().to_dict()
        return {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any
    ) -> SFAConfig:
        """Load a saved config: the `RecordedConfig` of an adapter, or an `SFAConfig` that was saved before its use.

        Args and errors are those of `RecordedConfig.from_pretrained`.
        """
        registered = cast(type[SFAConfig], PEFT_TYPE_TO_CONFIG_MAPPING[PeftType("SFA")])
        return registered.from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)

    def _fail(self, name: str, allowed: str) -> None:
        raise ValueError(f"SFAConfig.{name}={getattr(self, name)!r} is not valid; {allowed}.")

    def _check(self, name: str, is_valid: bool, allowed: str) -> None:
        if not is_valid:
            self._fail(name, allowed)

    def _validate(self) -> None:
        if self.budget is not None:
            given = [n for n in ("external_width", "internal_density") if getattr(self, n) is not None]
            if given:
                raise ValueError(
                    f"SFAConfig.budget={self.budget!r} and {given[0]}={getattr(self, given[0])!r} are both given, but "
                    f"the budget decides the widths and the density. Leave out one of them."
                )
            in_range = self.budget >= 1 if is_int(self.budget) else _is_number(self.budget) and 0 < self.budget < 1
            self._check("budget", in_range, "use an int of at least 1, or a float in (0, 1)")

        if self.external_placement == "auto" and (
            self.external_width is not None or self.internal_density is not None or self.external_share == 0
        ):
            self._fail(
                "external_placement",
                "it distributes the external share of a `budget`; set `budget` and an `external_share` above 0",
            )
        self._check_width()
        self._check_places()
        share = self.external_share
        self._check("external_share", _is_number(share) and 0 <= share <= 1, "use a float in [0, 1]")
        density = self.internal_density
        self._check(
            "internal_density", density is None or (_is_number(density) and 0 <= density <= 1), "use a float in [0, 1]"
        )
        dropout = self.external_dropout
        self._check("external_dropout", _is_number(dropout) and 0 <= dropout < 1, "use a float in [0, 1)")
        scale = self.external_scale
        self._check("external_scale", _is_number(scale) and scale != 0, "use a finite number other than 0")
        conv = self.external_conv
        is_size = conv is None or (is_int(conv) and (conv == 0 or (3 <= conv <= MAX_CONV and conv % 2 == 1)))
        self._check("external_conv", is_size, f"use an odd int from 3 to {MAX_CONV}, 0 for no filters, or None")
        if conv and self.external_placement == "auto":
            self._fail("external_conv", 'it cannot be combined with external_placement="auto"; use "uniform"')
        self._check("ticket_seed", is_int(self.ticket_seed), "use an int")
        self._check("init_weights", isinstance(self.init_weights, bool), "use True or False")
        self._check("keep_weights", isinstance(self.keep_weights, bool | None), "use True, False or None")
        for name, choices in (
            ("external_activation", ACTIVATIONS),
            ("external_placement", PLACEMENTS),
            ("internal_granularity", GRANULARITIES),
            ("initial_ticket", DATA_FREE),
        ):
            value = getattr(self, name)
            self._check(name, isinstance(value, str) and value in choices, f"choose one of {sorted(choices)}")
        for name in ("base_model_name_or_path", "revision", "task_type", "peft_version"):
            value = getattr(self, name)
            self._check(name, value is None or isinstance(value, str), "use a string or None")
        self._check("inference_mode", isinstance(self.inference_mode, bool), "use True or False")
        self._check(
            "auto_mapping", isinstance(self.auto_mapping, dict | None), "it is filled in when saving; leave it out"
        )
        for name in ("values_dtype", "heads_dtype"):
            value = getattr(self, name)
            self._check(
                name,
                value is None or (isinstance(value, str) and value in DTYPES),
                f"choose one of {sorted(DTYPES)}, or None",
            )
        for name in PATTERN_FIELDS:
            self._check_names(name)
        targets = self.target_heads
        are_names = isinstance(targets, list | tuple) and all(isinstance(t, str) and t for t in targets)
        self._check("target_heads", targets is None or are_names, "use a list of module names")
        if targets and self.target_modules is not None:
            self._fail("target_heads", "it needs `target_modules=None`; name the head's modules in `target_modules`")
        heads = self.modules_to_save
        is_list = isinstance(heads, list | tuple | set) and all(isinstance(h, str) and h for h in heads)
        self._check("modules_to_save", heads is None or is_list, "use a list of module names")
        layers = self.layers_to_transform
        indices = layers if isinstance(layers, list | tuple) else [layers]
        self._check(
            "layers_to_transform", layers is None or all(is_int(i) for i in indices), "use an int or a list of ints"
        )
        pattern = self.layers_pattern
        patterns = pattern if isinstance(pattern, list | tuple) else [pattern]
        are_names = pattern is None or all(isinstance(p, str) for p in patterns)
        self._check("layers_pattern", are_names, "use a name or a list of names")
        if self.layers_pattern and self.layers_to_transform is None:
            self._fail("layers_pattern", "it needs `layers_to_transform`; set that, or leave this out")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            self._fail("layers_to_transform", "it needs `target_modules` as a list of names, not a regular expression")

    def _is_pattern(self, value: Any) -> bool:
        try:
            re.compile(value)
        except (re.error, TypeError, RecursionError, OverflowError):
            return False
        return True

    def _check_width(self) -> None:
        allowed = "use an int >= 0, a float in [0, 1], or a dict from name patterns to these values"

        def is_width(width: Any) -> bool:
            return width >= 0 if is_int(width) else (_is_number(width) and 0 <= width <= 1)

        width = self.external_width
        if isinstance(width, dict):
            for pattern, value in width.items():
                if not self._is_pattern(pattern):
                    self._fail("external_width", f"{pattern!r} is not a regular expression")
                self._check("external_width", is_width(value), allowed)
        elif width is not None:
            self._check("external_width", is_width(width), allowed)

    def _check_places(self) -> None:
        places = self.external_places
        if places is None:
            return
        is_valid = isinstance(places, tuple) and all(place in PLACES for place in places)
        self._check(
            "external_places", is_valid and len(set(places)) == len(places), f"choose from {PLACES}, each once"
        )

    def _check_names(self, name: str) -> None:
        value = getattr(self, name)
        if isinstance(value, str):
            if not self._is_pattern(value):
                self._fail(name, "it is not a regular expression; correct it, or use a list of names")
        elif name == "external_modules" and isinstance(value, dict):
            is_valid = all(isinstance(key, str) and key for key in value) and all(
                item is None or (isinstance(item, str) and item) for item in value.values()
            )
            self._check(name, is_valid, "use a dict from names of modules to the name of a module, or to None")
        elif value is not None:
            is_valid = isinstance(value, set) and all(isinstance(item, str) and item for item in value)
            self._check(name, is_valid, "use a list of module names or a regular expression")
