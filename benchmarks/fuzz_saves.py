"""Loads while others save, and folders in which a save was killed."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fuzz_damage import copied, make_base
from fuzz_runner import Result, World, attempt, in_process
from sfa_peft import SFAConfig
from sfa_peft.checkpoint import seal
from sfa_peft.checkpoint.files import load_tensors
from sfa_peft.checkpoint.seal import CONFIG, WEIGHTS

# Each adapter has a field of the config that is sealed, one that is not, and weights that tell which it is.
SCALES = {0.25: 0.125, 0.5: 0.375}
SAVED = {"end": "saved"}
MOST_RENAMES = 50  # in one save
MOST_READS = 20  # in one load
SWAP_WAYS = ("from_pretrained", "load_adapter", "transformers")


def _adapter(scale: float) -> PeftModel:
    config = SFAConfig(
        budget=0.1 + scale / 10, external_share=0.4, external_scale=scale, external_dropout=SCALES[scale]
    )
    model = get_peft_model(make_base(), config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if ".sfa_" in name:
                p.fill_(scale)
    return model.eval()


def _mixture(model: Any) -> str | None:
    """What does not belong together in the adapter that was loaded last."""
    name, config = list(model.peft_config.items())[-1]
    parameters = [p for n, p in model.named_parameters() if ".sfa_" in n and f".{name}." in n]
    values = {float(v) for p in parameters for v in p.unique()}
    found = (config.external_scale, config.external_dropout, values)
    if config.external_scale not in SCALES:
        return f"unknown {found}"
    right = (config.external_scale, SCALES[config.external_scale], {config.external_scale})
    return None if found == right else f"a mixture of two saves: {found}"


def race(world: World, seconds: float) -> list[Result]:
    """Load as often as possible while two processes save two adapters to the same folder."""
    folder = world.folder / "race"
    savers = []
    results = []
    try:
        for scale in SCALES:
            model = _adapter(scale)
            model.save_pretrained(folder)
            child = os.fork()
            if not child:
                try:
                    while True:
                        model.save_pretrained(folder)
                finally:
                    os._exit(1)
            savers.append(child)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            found = _wanted(in_process(partial(attempt, world, "from_pretrained", folder, _mixture)))
            results.append(Result("race", f"load {len(results)}", "from_pretrained", **found))
        if any(os.waitpid(child, os.WNOHANG) != (0, 0) for child in savers):
            results.append(Result("race", "saving", "save_pretrained", error="a saver failed"))
    finally:
        for child in savers:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    return results


def _wanted(found: dict[str, Any]) -> dict[str, Any]:
    """What a load gave that must not be refused."""
    return found | {"changed": "a good adapter was refused"} if found["end"] == "refused" else found


def swaps(world: World) -> list[Result]:
    """A save between any two reads of a load: of both files, or, if it is not yet through, of the weights only."""
    folders = []
    for scale in SCALES:
        folders.append(world.folder / f"swap-{scale}")
        _adapter(scale).save_pretrained(folders[-1])
    results = []
    for way, files in itertools.product(SWAP_WAYS, ((WEIGHTS,), (WEIGHTS, CONFIG))):
        for number in range(MOST_READS):
            folder = copied(folders[0], world.folder / f"swap-{way}-{len(files)}-{number}")
            found = in_process(partial(_swapped, world, way, folder, folders[1], files, number))
            is_over = found.pop("is_over", True)
            name = f"a save of {' and '.join(files)} before read {number + 1}"
            results.append(Result("race", name, way, **found))
            if is_over:
                break
    return results


def _swapped(world: World, way: str, folder: Path, other: Path, files: Sequence[str], number: int) -> dict[str, Any]:
    """Load from a folder whose files are replaced before a read; `is_over` says that there was no such read."""
    reads = 0

    def before_read() -> None:
        nonlocal reads
        reads += 1
        if reads == number + 1:
            for file in files:
                shutil.copy(other / file, folder / f"{file}.new")
                os.replace(folder / f"{file}.new", folder / file)

    def on_event(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and str(args[0]) == str(folder / CONFIG):
            before_read()

    def read_weights(path: Path) -> Any:
        before_read()
        return load_tensors(path)

    from_file = torch.UntypedStorage.from_file

    def read_storage(*args: Any, **kwargs: Any) -> Any:
        before_read()
        return from_file(*args, **kwargs)

    sys.addaudithook(on_event)
    with (
        mock.patch.object(seal, "load_tensors", read_weights),  # which opens the file without an event,
        mock.patch.object(torch.UntypedStorage, "from_file", read_storage),  # and once more for the tensors
    ):
        found = _wanted(attempt(world, way, folder, _mixture))
    return found | {"is_over": reads <= number}


class _Kill:
    """Ends the process instead of the n-th rename."""

    def __init__(self, number: int) -> None:
        self.left, self.replace = number, os.replace

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        if not self.left:
            os._exit(0)
        self.left -= 1
        self.replace(*args, **kwargs)


def kill(world: World, below: Sequence[str] = ("SFA", "LoRA")) -> list[Result]:
    """Save an adapter over another one, of SFA or LoRA, and kill the process at each rename."""

    def lora() -> PeftModel:
        return get_peft_model(make_base(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    results = []
    befores: dict[str, Callable[[], PeftModel]] = {"SFA": lambda: _adapter(0.25), "LoRA": lora}
    after = _adapter(0.5)
    for name in below:
        old = befores[name]()
        for number in range(MOST_RENAMES):
            folder = world.folder / f"kill-{name}-{number}"
            old.save_pretrained(folder)
            is_whole = in_process(partial(_save_until, after, folder, number), 60) == SAVED
            found = in_process(partial(attempt, world, "from_pretrained", folder, partial(_after_kill, old)))
            when = "not killed" if is_whole else f"before rename {number + 1}"
            results.append(Result("kill", f"over {name}, {when}", "from_pretrained", **found))
            if is_whole:
                break
    return results


def _save_until(model: PeftModel, folder: Path, number: int) -> dict[str, Any]:
    with mock.patch.object(os, "replace", _Kill(number)):
        model.save_pretrained(folder)
    return SAVED


def _after_kill(old: PeftModel, model: PeftModel) -> str | None:
    """What is wrong with the model that the folder loads as; None if it is the old adapter or the new one."""
    if model.peft_type == "SFA":
        return _mixture(model)
    values = {n: p for n, p in old.named_parameters() if "lora_" in n}
    if all(torch.equal(p, values[n]) for n, p in model.named_parameters() if "lora_" in n):
        return None
    return f"loaded as {model.peft_type.value} with values that nobody saved"
