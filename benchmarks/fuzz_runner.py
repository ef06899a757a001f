"""Loads one damaged adapter in a process of its own, by each of the ways in, and says what it did.

A process has a time limit and a memory limit, so that a hang or a bomb is one bad result and not the end.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import io
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForSemanticSegmentation

from fuzz_damage import copied, make_base, save_adapter
from sfa_peft import CheckpointError, SFAConfig, Ticket, TicketSearchError, cli, search_ticket
from sfa_peft.checkpoint.seal import CONFIG, WEIGHTS

# What a file under 1 MB may cost on a tiny model. Larger files may cost as many times more.
SECONDS, MEGABYTES = 2.0, 200
KILL_AFTER = 5.0  # seconds
MAKE_SECONDS = 120.0  # to write a file
MEMORY_LIMIT = 1500  # megabytes beyond what the process has

TICKET, SEARCH = "ticket.safetensors", "search.safetensors"
SEARCH_STEPS = 3


@dataclass
class Result:
    """What became of one file by one way in.

    Attributes:
        kind, case, way: Which file it is, and how it was loaded.
        end: `refused` (a readable error), `accepted`, `raw` (another exception), `killed`, or `died`.
        error: The exception.
        changed: What is not as it was, though it should be; None if nothing.
        must_refuse: Whether the file must not be accepted.
        seconds: Time of the processor; of the clock if the process was killed.
        megabytes: The most memory that the load took.
        size: Of the files, in megabytes.
    """

    kind: str
    case: str
    way: str
    end: str = "died"
    error: str = ""
    changed: str | None = None
    must_refuse: bool = False
    seconds: float = 0.0
    megabytes: float = 0.0
    size: float = 0.0

    @property
    def is_slow(self) -> bool:
        return self.end == "killed" or self.seconds > SECONDS * max(1.0, self.size)

    @property
    def is_large(self) -> bool:
        return self.megabytes > MEGABYTES * max(1.0, self.size)

    @property
    def failure(self) -> str | None:
        """What is wrong with the result, or None."""
        found = []
        if self.end in ("raw", "killed", "died"):
            found.append(f"{self.end} {self.error}".strip())
        if self.end == "accepted" and self.must_refuse:
            found.append("accepted")
        if self.changed:
            found.append(self.changed)
        if self.is_slow:
            found.append(f"took {self.seconds:.1f} s")
        if self.is_large:
            found.append(f"took {self.megabytes:.0f} MB")
        return "; ".join(found) or None

    def __str__(self) -> str:
        return f"{self.kind}, {self.case}, {self.way}: {self.failure or self.end}"


class World:
    """Good adapters, and the models that bad ones are loaded into.

    Attributes:
        folder: A temporary folder for everything.
        sources: The folders of the good adapters, by granularity.
        base: The base model.
        adapted: The same base with the good adapter `elements`, under the name `default`.
        searched: The same base with a fresh adapter, for searches.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.base = make_base()
        self.base_folder = folder / "base"
        self.base.save_pretrained(self.base_folder)
        self.sources: dict[str, Path] = {}
        for name, options in (("elements", {}), ("rows", {"internal_granularity": "row"})):
            self.sources[name] = folder / name
            save_adapter(folder / name, str(self.base_folder), **options)
        self.adapted = PeftModel.from_pretrained(make_base(), str(self.sources["elements"])).eval()
        self.x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        self.output = output_of(self.base, self.x)
        self.reference = {name: t.clone() for name, t in self.base.state_dict().items()}
        self.flags = {name: p.requires_grad for name, p in self.base.named_parameters()}
        self.first = {name: t.clone() for name, t in get_peft_model_state_dict(self.adapted).items()}
        self.search_file, self.ticket_file = folder / SEARCH, folder / TICKET
        self.searched = get_peft_model(make_base(), SFAConfig(budget=0.1, modules_to_save=["classifier"]))
        self.unsearched = {name: t.clone() for name, t in self.searched.state_dict().items()}
        self._interrupt_a_search()
        search_ticket(copy.deepcopy(self.searched), batches(), steps=1, progress=False).ticket.save(self.ticket_file)

    def _interrupt_a_search(self) -> None:
        steps = []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            steps.append(None)
            if len(steps) == SEARCH_STEPS:
                raise KeyboardInterrupt
            found: Tensor = model(**batch).loss
            return found

        with contextlib.suppress(KeyboardInterrupt):
            run_search(copy.deepcopy(self.searched), self.search_file, loss_fn=loss)


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator), "labels": torch.zeros(2, 32, 32).long()}
        for _ in range(2)
    ]


def run_search(model: nn.Module, file: Path, **options: Any) -> None:
    search_ticket(model, batches(), steps=SEARCH_STEPS, checkpoint=file, checkpoint_every=1, progress=False, **options)


@torch.no_grad()
def output_of(model: nn.Module, x: Tensor) -> Tensor:
    found: Tensor = model.eval()(x).logits
    return found


# The ways in. Each loads what is in a folder and gives the model that it was loaded into, if any.


def by_from_pretrained(world: World, folder: Path) -> nn.Module:
    return PeftModel.from_pretrained(world.base, str(folder))


def by_load_adapter(world: World, folder: Path) -> nn.Module:
    world.adapted.load_adapter(str(folder), "new")
    return world.adapted


def by_hotswap(world: World, folder: Path) -> nn.Module:
    hotswap_adapter(world.adapted, str(folder), "default", torch_device="cpu")
    return world.adapted


def by_state_dict(world: World, folder: Path) -> nn.Module:
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise CheckpointError(f"the caller cannot read the file: {error}") from error
    set_peft_model_state_dict(world.adapted, tensors)
    return world.adapted


def by_transformers(world: World, folder: Path) -> nn.Module:
    world.base.load_adapter(str(folder))
    return world.base


def by_auto(world: World, folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForSemanticSegmentation.from_pretrained(str(folder))
    return model


def by_config(world: World, folder: Path) -> None:
    SFAConfig.from_pretrained(str(folder))


def by_ticket(world: World, folder: Path) -> None:
    Ticket.load(folder / TICKET)


def by_search(world: World, folder: Path) -> nn.Module:
    run_search(world.searched, folder / SEARCH)
    return world.searched


def _by_command(*arguments: str) -> Callable[[World, Path], None]:
    def run(world: World, folder: Path) -> None:
        known = {
            "FOLDER": str(folder),
            "BASE": str(world.base_folder),
            "OUT": str(folder.parent / "merged"),
            "GOOD": str(world.sources["elements"]),
        }
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as text:
            code = cli.main([known.get(a, a) for a in arguments])
        if code != cli.OK:
            raise CheckpointError(f"the command says: {text.getvalue() or 'the adapters differ'}")

    return run


WAYS: dict[str, Callable[[World, Path], nn.Module | None]] = {
    "from_pretrained": by_from_pretrained,
    "load_adapter": by_load_adapter,
    "hotswap": by_hotswap,
    "state_dict": by_state_dict,
    "transformers": by_transformers,
    "auto": by_auto,
    "config": by_config,
    "ticket": by_ticket,
    "search": by_search,
    "verify": _by_command("verify", "FOLDER", "--base", "BASE"),
    "inspect": _by_command("inspect", "FOLDER"),
    "merge": _by_command("merge", "FOLDER", "--base", "BASE", "--out", "OUT"),
    "diff": _by_command("diff", "GOOD", "FOLDER"),
}
LOADS = ("from_pretrained", "load_adapter", "hotswap", "state_dict", "transformers", "auto", "verify")


def _is_readable(error: BaseException, way: str) -> bool:
    """Whether an error is one that a user can act on: of a type that is promised, with a sentence."""
    kinds = [CheckpointError, ValueError, TicketSearchError]  # not their subclasses, such as JSONDecodeError
    if way == "ticket":
        kinds.append(FileNotFoundError)
    return type(error) in kinds and len(str(error).split()) >= 4


def _change(world: World, model: nn.Module | None, way: str, is_loaded: bool) -> str | None:
    """What is not as it was before the load, or None."""
    for base in (world.base, world.adapted.get_base_model()):
        if not all(torch.equal(t, world.reference[n]) for n, t in plain_state(base).items() if n in world.reference):
            return "a weight of the base changed"
    if is_loaded and model is not None:
        plain = plain_state(model)
        if plain.keys() != world.reference.keys():
            return "tensors of the base were added or removed"
        if not all(torch.equal(t, world.reference[n]) for n, t in plain.items()):
            return "a weight of the base changed"
        # Weights that transformers reads lie otherwise in memory, so sums may differ in the last bit.
        tolerance = 1e-8 if way == "auto" else 0.0
        if not torch.allclose(_disabled_output(model, world.x), world.output, rtol=0.0, atol=tolerance):
            return "the output without the adapter changed"
        if isinstance(model, PeftModel):
            if way == "load_adapter" and not _is_same(get_peft_model_state_dict(world.adapted), world.first):
                return "another adapter changed"
            unloaded = model.unload()
            if not _is_same(unloaded.state_dict(), world.reference):
                return "unload() does not give the base back"
            if not torch.equal(output_of(unloaded, world.x), world.output):
                return "the output after unload() changed"
    if not is_loaded:
        if not _is_same(world.base.state_dict(), world.reference):
            return "a failed load left something in the base"
        if {n: p.requires_grad for n, p in world.base.named_parameters()} != world.flags:
            return "a failed load changed requires_grad"
        if list(world.adapted.peft_config) != ["default"]:
            return "a failed load left an adapter in the model"
        if not _is_same(get_peft_model_state_dict(world.adapted), world.first):
            return "a failed load changed the adapter"
        if not _is_same(world.searched.state_dict(), world.unsearched):
            return "a failed search changed the model"
    return None


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of the base, by their names in it."""
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", ""): tensor
        for name, tensor in model.state_dict().items()
        if ".sfa_" not in name and ".lora_" not in name and ".modules_to_save." not in name
    }


def _disabled_output(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            return output_of(model, x)
    for module in model.modules():  # transformers' disable_adapters leaves the heads
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            module.enable_adapters(False)
    return output_of(model, x)


def _is_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def _status(field: str) -> int:
    """A field of the process's status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def attempt(
    world: World, way: str, folder: Path, judge: Callable[[Any], str | None] = lambda model: None
) -> dict[str, Any]:
    """Load what is in a folder, in this process.

    Args:
        world, way, folder: What to load, how, and into what.
        judge: Says what is wrong with a loaded model, beside the base.
    """
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") * 1024 + MEMORY_LIMIT * 2**20, hard))
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    found: dict[str, Any] = {"end": "accepted", "error": ""}
    model = None
    before, begin = _status("VmRSS"), time.process_time()
    try:
        model = WAYS[way](world, folder)
    except BaseException as error:
        found["end"] = "refused" if _is_readable(error, way) else "raw"
        found["error"] = f"{type(error).__name__}: {error}"[:300].encode(errors="replace").decode()
    found["seconds"] = time.process_time() - begin
    found["megabytes"] = max(0, _status("VmHWM") - before) / 1024
    if "MemoryError" in found["error"] or "can't allocate memory" in found["error"]:
        found["megabytes"] = max(found["megabytes"], MEMORY_LIMIT)  # it asked for more than there is
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    if found["end"] == "accepted" and (wrong := judge(model)):
        return found | {"changed": wrong}
    found["changed"] = _change(world, model, way, found["end"] == "accepted")
    return found


def in_process(function: Callable[[], dict[str, Any]], seconds: float = KILL_AFTER) -> dict[str, Any]:
    """Run a function in a fork of this process, and kill it after some time.

    One that waits until it is killed is run again: what waits for ever does so twice, a busy machine does not.
    """
    found = _in_fork(function, seconds)
    if found.pop("is_waiting", False):
        found = _in_fork(function, seconds)
        found.pop("is_waiting", None)
    return found


def _in_fork(function: Callable[[], dict[str, Any]], seconds: float) -> dict[str, Any]:
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of a fork beside threads
        child = os.fork()
    if not child:
        os.close(reading)
        try:
            silence = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(silence, stream)
            warnings.simplefilter("ignore")
            huggingface_hub.constants.HF_HUB_OFFLINE = True  # what is not in a folder is not looked for on the Hub
            answer = function()
        except BaseException as error:
            answer = {"end": "died", "error": f"{type(error).__name__}: {error}"[:300]}
        with contextlib.suppress(BaseException):
            os.write(writing, json.dumps(answer).encode())
        os._exit(0)
    os.close(writing)
    is_late = not select.select([reading], [], [], seconds)[0]
    if is_late:
        os.kill(child, signal.SIGKILL)
    text = b"".join(iter(lambda: os.read(reading, 1 << 16), b""))
    os.close(reading)
    used = os.wait4(child, 0)[2]
    if is_late:
        # It may have computed all the time, or waited, for a pipe or for a busy machine.
        return {"end": "killed", "seconds": seconds, "is_waiting": used.ru_utime + used.ru_stime < seconds / 2}
    return dict(json.loads(text)) if text else {"end": "died"}


@dataclass
class Attack:
    """One bad file.

    Attributes:
        kind, name: Which it is.
        make: Writes it into a folder, which has a copy of the good adapter.
        ways: The ways in to try.
        must_refuse: Whether it must not be accepted.
        source: The good adapter.
    """

    kind: str
    name: str
    make: Callable[[Path], None]
    ways: Sequence[str] = ("from_pretrained",)
    must_refuse: bool = False
    source: str = "elements"


def run(world: World, attack: Attack, kill_after: float = KILL_AFTER) -> list[Result]:
    """Make the file of an attack, and load it by each way. Loads are killed after some time, of large files later."""
    place = Path(tempfile.mkdtemp(dir=world.folder))
    results = []
    try:
        folder = copied(world.sources[attack.source], place / "adapter")
        made = in_process(lambda: {"end": "made", "made": attack.make(folder)}, MAKE_SECONDS)
        if made["end"] != "made":
            raise RuntimeError(f"{attack.kind}, {attack.name}: the file was not made: {made}")
        size = sum(f.lstat().st_size for f in folder.iterdir()) / 2**20
        for way in attack.ways:
            found = in_process(partial(attempt, world, way, folder), kill_after * min(max(size, 1), 6))
            results.append(Result(attack.kind, attack.name, way, must_refuse=attack.must_refuse, size=size, **found))
    finally:
        shutil.rmtree(place)
    return results


def as_json(results: Sequence[Result]) -> list[dict[str, Any]]:
    return [asdict(result) | {"failure": result.failure} for result in results]


def trim() -> None:
    """Give free memory back, so that a load cannot use it unseen."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL("libc.so.6").malloc_trim(0)


__all__ = ["CONFIG", "LOADS", "SEARCH", "TICKET", "WEIGHTS", "Attack", "Result", "World", "as_json", "run", "trim"]
