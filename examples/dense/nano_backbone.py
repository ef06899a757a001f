"""Nano backbones, pretrained on the embedded scenes of another domain, so that the examples need no download."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm.auto import tqdm
from transformers import Dinov2Config, SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from .augmentation import Augmentation, finished, to_tensors
from .models import LinearHead, use_fast_attention
from .samples import IGNORE_INDEX, Sample
from .scenes import CLASSES, HEIGHT, WIDTH, make_scenes

VERSION = 2
STEPS = 190
SCENES = 400
BATCH_SIZE = 8


def _swin(size: tuple[int, int]) -> SwinConfig:
    return SwinConfig(
        image_size=size,
        patch_size=4,
        embed_dim=48,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=4,
        drop_path_rate=0.05,
        out_features=["stage1", "stage2", "stage3"],
    )


def _dinov2(size: tuple[int, int]) -> Dinov2Config:
    return Dinov2Config(
        image_size=min(size),  # of the position embeddings, which are interpolated from a square
        patch_size=8,
        hidden_size=128,
        num_hidden_layers=8,
        num_attention_heads=4,
        drop_path_rate=0.05,
        layerscale_value=0.1,
        out_features=["stage2", "stage4", "stage6", "stage8"],
        reshape_hidden_states=True,
    )


KINDS = {"swin": _swin, "dinov2": _dinov2}


def cache_folder(kind: str, size: tuple[int, int], scenes: int, steps: int) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sfa_peft" / f"{kind}-nano-dusk-{VERSION}-{size[0]}x{size[1]}-{scenes}-{steps}"


def pretrained_nano_backbone(
    accelerator: Accelerator,
    kind: str = "swin",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    scenes: int = SCENES,
    steps: int = STEPS,
) -> str:
    """The folder of a nano backbone; pretrained now, by default in under a minute on two cores, if not cached.

    Args:
        accelerator: Says where; one process pretrains.
        kind: ``swin`` or ``dinov2``.
        size: Height and width of the images.
        scenes: How many different ones.
        steps: Training steps, of 8 images.
    """
    folder = cache_folder(kind, size, scenes, steps)
    with accelerator.main_process_first():
        if not (folder / "config.json").exists():
            accelerator.print(f"Pretraining a nano {kind} on dusk scenes, once; it is kept in {folder}")
            _pretrain(folder, accelerator.device, kind, size, scenes, steps)
    return str(folder)


def _pretrain(folder: Path, device: torch.device, kind: str, size: tuple[int, int], count: int, steps: int) -> None:
    set_seed(0)
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=KINDS[kind](size),
            use_auxiliary_head=False,
            loss_ignore_index=IGNORE_INDEX,
            num_labels=len(CLASSES),
        )
    )
    model.decode_head = LinearHead(model.backbone.channels, len(CLASSES))
    use_fast_attention(model, model.backbone, device)
    model.to(device).train()

    scenes = [
        to_tensors(Sample(scene["image"], label=np.asarray(scene["label"])), size)
        for scene in make_scenes(count, seed=1, style="dusk")
    ]
    augmentation = Augmentation(size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    rng = np.random.default_rng(0)
    with tqdm(total=steps, desc="pretraining") as bar:
        for step in range(steps):
            batch = [finished(augmentation(scenes[i], (step, i))) for i in rng.integers(count, size=BATCH_SIZE)]
            images, labels = (torch.stack([t[name] for t in batch]).to(device) for name in ("image", "label"))
            loss = model(pixel_values=images, labels=labels).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.3f}")

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        model.backbone.save_pretrained(Path(unfinished) / "model")
        (Path(unfinished) / "model").rename(folder)
