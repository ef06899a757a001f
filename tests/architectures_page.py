"""Writes docs/architectures.md from the table of architectures and the list of those that the tests run.

python tests/architectures_page.py
"""

from itertools import groupby
from pathlib import Path

from backbones import BACKBONES, CONTAINED, FOLDED
from sfa_peft.planning.architectures import EARLIER
from sfa_peft.planning.registry import registered_architectures

PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"

BEGIN = """\
# Architectures

The blocks that `SFAConfig` finds by itself, in any model that has them: alone, or as the backbone of a dense model
(UperNet, DPT, Mask2Former, MaskFormer, OneFormer, Depth Anything, ZoeDepth, Deformable DETR, Grounding DINO, ViTPose
and the like). Only the blocks of the backbone are adapted. Decoders and heads are not, although their layers often
have the same names. For any other model see [below](#your-own-blocks).

All names are relative to the block. Leaves in brackets are adapted in the variants that have them. The places `mlp`,
`mlp_parallel` and `block` are on the same leaf. `mlp_parallel` reads the input of the module that is named behind it;
`block` reads the sum of the leaf's output and the residual, which is the input of the module that is named last.

"""

MIDDLE = """

`tests/test_architectures.py` does all this with a tiny model of each:

- **found**: `SFAConfig(budget=...)` names nothing, and the targets and places are those of the table; the outputs
  stay the same.
- **step**: in a training step, every parameter of the adapter has a gradient.
- **search**: `search_ticket` finds and installs a ticket, and every target is used.
- **round trip**: the adapter is saved, loaded into a new base model, and gives the same outputs, bit for bit.
- **merge**: `merge_and_unload` gives the same outputs, up to rounding. *folds*: external adapters at `mlp_parallel`
  become hidden units of the MLP, if `external_activation` is the MLP's activation and the MLP is not a gated one;
  the result is a plain model that `save_pretrained` saves. *stays*: they stay modules of the merged model; see
  [deploying.md](deploying.md).

**Filters** (`external_conv`) need the grid of an image's tokens. Where the column says yes, SFA finds it: from the
argument of the block that has it (the family of Swin, at the places of the MLP), or from the patch embedding. The
tokens must all be there and in order, after any others. Elsewhere `external_conv` is refused.

The blocks of timm, Microsoft, Meta and `rfdetr` are in the table with small modules that have the same class names,
names of layers and order of operations. Further tests use timm itself where it is installed, which needs torchvision,
and kornia's copy of Meta's DINOv2.

What does not follow from the table:

- Norms of a class with a forward of its own, as those of timm's ViT, are left out of the targets.
- ViTPose with experts has no place at the MLP. Use `external_places=("attention",)`, or `()`.
- The whole CLIP or SigLIP model has two towers. Only the vision tower is adapted. SigLIP's pooling head has an MLP
  of the same width as the blocks, so a SigLIP model with that head is not folded.
- CLIP and SigLIP use variants of GELU that `external_activation` does not have, so these models fold only if their
  config says `hidden_act="gelu"`.
- Meta's blocks compute the MLP and the scales without calling the modules when they pretrain: DINOv2 with lists of
  images (nested tensors), DINOv3 with stochastic depth. Adapters cannot act there. Models from torch.hub have no
  stochastic depth, and take one tensor.

## Your own blocks

Describe the class of your blocks once, and every `SFAConfig` finds them. These are the blocks of the Pyramid Vision
Transformer in transformers:

```python
from sfa_peft import Architecture, register_architecture

register_architecture(
    Architecture(
        name="PVT",
        block="PvtLayer",
        targets=(
            "layer_norm_1",
            "attention.self.query",
            "attention.self.key",
            "attention.self.value",
            "attention.output.dense",
            "layer_norm_2",
            "mlp.dense1",
            "mlp.dense2",
        ),
        optional=("attention.self.sequence_reduction", "attention.self.layer_norm"),
        places={
            "attention": "attention.output.dense",
            "mlp": "mlp.dense2",
            "mlp_parallel": "mlp.dense2",
            "block": "mlp.dense2",
        },
        mlp_input="mlp",
        block_input="layer_norm_2",
    )
)
```

If merging is to fold external adapters into the MLP, `mlp` says where its two linear layers and its activation are,
and which field of the config decides its width, such as `mlp=PlainMLP("intermediate_size", is_ratio=False,
fc1="mlp.up", activation="mlp.act", fc2="mlp.down")`. `block_input` is the module whose input is the residual that the
place `block` reads, most often the norm of the MLP. If external adapters are to have filters, `grid` says what tells
the grid of the tokens: the argument of the block's forward with its height and width, `"patches"`, or `"maps"`.

- Where a block scales (LayerScale) or normalizes the output of a sub-layer before the residual sum, the place is the
  scale or the norm, and not the linear layer: it would damp what the adapter adds. `PlainMLP.factor` names the
  parameter of such a scale.
- Two classes of one name are told apart by `has`, the modules or parameters that a block must have. `inside` keeps
  blocks out that a text tower or a decoder has as well. Of several descriptions that apply, the last registered one
  is used; so you can replace one of the table.
- A wrong description is an error with the names: when it is registered, if it cannot be right for any model; when an
  adapter is added, if the blocks lack a name.
- An adapter does not contain the description. Register it before you load the adapter, too.
- A package registers its own with an entry point. It is loaded when SFA first looks for blocks; one that fails is a
  warning with the name of the package.

```toml
[project.entry-points."sfa_peft.architectures"]
mine = "my_package.architectures:BLOCKS"  # an Architecture, or a list of them
```

For one model it is enough to name modules in the config. A dict in `external_modules` also names the module whose
input the adapters read, as at `mlp_parallel`; such an adapter loads without
registering anything:

```python
config = SFAConfig(budget=0.02, target_modules=["qkv", "proj", "fc1", "fc2"], external_modules={"mlp.fc2": "mlp"})
```

For a model without known blocks, the error lists the blocks that it repeats, with both forms filled in.
"""


def page():
    """The text of the page."""
    columns = ("architecture", "class of the block", "targets", "places")
    columns = (*columns, "found", "step", "search", "round trip", "merge", "filters")
    rows = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for architecture in registered_architectures():
        name = architecture.name.removesuffix(EARLIER)  # tested when the tests run with that transformers
        is_tested = name in BACKBONES or name in CONTAINED
        merges = ("folds" if name in FOLDED else "stays") if "mlp" in architecture.places else "yes"
        cells = [
            architecture.name,
            f"`{architecture.block}`",
            _names(architecture.targets) + (f" ({_names(architecture.optional)})" if architecture.optional else ""),
            _places(architecture),
            *["yes" if is_tested else ""] * 4,
            merges if is_tested else "",
            "" if architecture.grid is None else "yes",
        ]
        rows.append(f"| {' | '.join(cells)} |")
    return BEGIN + "\n".join(rows) + MIDDLE


def _names(names):
    """The names, those in one module together."""
    texts = []
    for module, grouped in groupby(names, lambda name: name.rpartition(".")[0]):
        leaves = [name.rpartition(".")[2] for name in grouped]
        if module:
            texts.append(f"`{module}.{leaves[0]}`" if len(leaves) == 1 else f"`{module}.{{{', '.join(leaves)}}}`")
        else:
            texts += [f"`{leaf}`" for leaf in leaves]
    return ", ".join(texts)


def _places(architecture):
    places = dict(architecture.places)
    if not places:
        return "none"
    parts = [f"attention: `{places['attention']}`"] if "attention" in places else []
    if "mlp" in places:
        residual = f", residual at `{architecture.block_input}`" if "block" in places else ", no place `block`"
        parts.append(f"mlp: `{places['mlp']}`, input of `{architecture.mlp_input}`{residual}")
    return "; ".join(parts) + (f" ({architecture.note})" if architecture.note else "")


if __name__ == "__main__":
    PAGE.write_text(page())
