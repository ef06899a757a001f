"""A nano Swin, pretrained on the embedded scenes of another domain, so that the demo needs no download."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import SwinConfig, UperNetConfig, UperNetForSemanticSegmentation

from data import Segmentation
from models import IGNORE_INDEX, LinearHead, use_fast_attention
from scenes import CLASSES, HEIGHT, WIDTH, make_scenes

VERSION = 1
STEPS = 190
SCENES = 400
BATCH_SIZE = 8


def cache_folder(size: tuple[int, int], scenes: int, steps: int) -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "sfa_peft" / f"swin-nano-dusk-{VERSION}-{size[0]}x{size[1]}-{scenes}-{steps}"


def pretrained_nano_backbone(
    accelerator: Accelerator, size: tuple[int, int] = (HEIGHT, WIDTH), scenes: int = SCENES, steps: int = STEPS
) -> str:
    """The folder of the nano backbone; pretrained now, by default in under a minute on two cores, if not cached.

    Args:
        accelerator: Says where; one process pretrains.
        size: Height and width of the images.
        scenes: How many different ones.
        steps: Training steps, of 8 images.
    """
    folder = cache_folder(size, scenes, steps)
    with accelerator.main_process_first():
        if not (folder / "config.json").exists():
            accelerator.print(f"Pretraining a nano Swin on dusk scenes, once; it is kept in {folder}")
            _pretrain(folder, accelerator.device, size, scenes, steps)
    return str(folder)


def _pretrain(folder: Path, device: torch.device, size: tuple[int, int], count: int, steps: int) -> None:
    set_seed(0)
    config = SwinConfig(
        image_size=size,
        patch_size=4,
        embed_dim=48,
        depths=[2, 2, 2],
        num_heads=[2, 4, 8],
        window_size=4,
        drop_path_rate=0.05,
        out_features=["stage1", "stage2", "stage3"],
    )
    model = UperNetForSemanticSegmentation(
        UperNetConfig(
            backbone_config=config, use_auxiliary_head=False, loss_ignore_index=IGNORE_INDEX, num_labels=len(CLASSES)
        )
    )
    model.decode_head = LinearHead(model.backbone.channels, len(CLASSES))
    use_fast_attention(model, device)
    model.to(device).train()

    scenes = make_scenes(count, seed=1, style="dusk")
    data = Segmentation({"train": scenes, "validation": scenes.select([0])}, dict(enumerate(CLASSES)), size)
    loader = DataLoader(data.train, batch_size=BATCH_SIZE, shuffle=True, drop_last=True, collate_fn=data.train_batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    step = 0
    with tqdm(total=steps, desc="pretraining") as bar:
        while step < steps:
            for batch in loader:
                loss = model(**{k: v.to(device) for k, v in batch.items()}).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}")
                step += 1
                if step == steps:
                    break

    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        model.backbone.save_pretrained(Path(unfinished) / "model")
        (Path(unfinished) / "model").rename(folder)
