"""Export an adapted model: merged, as a plain model of transformers, and as an ONNX file; both are checked and timed.

    python examples/export.py --run out/demo --output_dir out/demo-export
    python examples/export.py --run me/my-adapter --output_dir out/mine

`--run` is the output folder of one of the other examples, trained with SFA, or any SFA adapter that stands alone: a
folder that `save_pretrained` wrote, or a repository on the Hub. Needs `pip install onnx onnxscript onnxruntime` for
ONNX.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.export import Dim

from sfa_peft import SFAConfig

from dense.augmentation import finished, to_tensors
from dense.errors import FlagError, told
from dense.folder import Products
from dense.inference import PROCESSOR, load, pixels_of
from dense.limits import above_0, whole
from dense.samples import Sample
from dense.scenes import make_scene
from multi_task import TASKS

MERGED, ONNX, NUMBERS = "merged", "onnx", "export.json"
CPU = torch.device("cpu")
WARM_UP = 3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument(
        "--run", "--adapter", required=True, help="Folder of a finished run, or an adapter, or its Hub id."
    )
    parser.add_argument("--model", "--base", help="Where the model is that the run began with. Default: where it was.")
    parser.add_argument(
        "--image_size",
        type=whole(1),
        nargs=2,
        metavar=("HEIGHT", "WIDTH"),
        help="Default: what the adapter's image processor makes.",
    )
    parser.add_argument("--batch_size", type=whole(1), default=1, help="Of the ONNX file, and of the timing.")
    parser.add_argument("--dynamic_batch", action="store_true", help="The ONNX file takes batches of any size.")
    parser.add_argument(
        "--widen", action="store_true", help="Fold external adapters into wider MLPs whatever zeros that costs."
    )
    parser.add_argument("--tolerance", type=above_0, default=1e-4, help="Of the outputs, relative to the largest.")
    parser.add_argument("--repeats", type=whole(1), default=20, help="Of the timing, which gives medians.")
    parser.add_argument("--output_dir", type=Path, default=Path("out/export"))
    parser.add_argument("--overwrite", action="store_true", help="Replace what an earlier export has left there.")
    return parser.parse_args(arguments)


def adapted_model(args: argparse.Namespace) -> tuple[PeftModel, tuple[int, int]]:
    """The model with its adapter, and the height and width of images.

    Raises:
        FlagError: If it cannot be loaded, has no SFA adapter, or nothing says how large images are.
    """
    loaded = load(args.run, TASKS, CPU, args.model)
    model = loaded.model
    if not isinstance(model, PeftModel) or not isinstance(model.active_peft_config, SFAConfig):
        raise FlagError(f"{args.run} has no SFA adapter: merge what another method has trained with its own tools")
    if args.image_size is not None:
        height, width = args.image_size
    elif loaded.processor is not None:
        height, width = pixels_of(loaded.processor, [make_scene(0)["image"]]).shape[-2:]
    else:
        raise FlagError(f"{args.run} has no {PROCESSOR}, so nothing says how large its images are: give --image_size")
    return model, (height, width)


def merge(model: PeftModel, widen: bool) -> tuple[nn.Module, str]:
    """The merged model, and why it is no plain model of transformers: "" if it is one.

    External adapters that cannot be folded stay in it as modules, which an ONNX file can have and a config cannot.

    Raises:
        FlagError: If its head is not of transformers.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        merged = model.merge_and_unload(safe_merge=True, widen=True if widen else "auto")
    foreign = {name: type(part) for name, part in merged.named_modules() if not is_stock(part)}
    own = {name for name, kind in foreign.items() if kind.__module__.startswith("sfa_peft.")}
    if foreign.keys() - own:
        name, kind = next((name, kind) for name, kind in foreign.items() if name not in own)
        raise FlagError(
            f"from_pretrained could not load the merged model: its {name or 'class'} is a {kind.__name__}, which is "
            f"not of transformers (a --head linear, for example)"
        )
    if not own:
        return merged, ""
    why = " ".join(str(one.message) for one in said).partition("Reasons: ")[2].rstrip(".")
    zeros = "--widen, if it is only for the zeros; " if not widen else ""
    return merged, (
        f"external adapters cannot be folded into it: {why}. Ways to a plain model: {zeros}training with "
        f"--external_conv 0, if it is for filters; `sfa-peft merge`, which puts these adapters beside the model"
    )


def is_stock(module: nn.Module) -> bool:
    """Whether a module's class is in every installation of transformers."""
    return type(module).__module__.partition(".")[0] in ("torch", "transformers")


class Outputs(nn.Module):
    """A model that gives its tensors as a tuple, as ONNX has them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensors_of(self.model(pixel_values)).values())


def tensors_of(output: Mapping[str, Any]) -> dict[str, Tensor]:
    """Of what a model gives, the tensors of numbers that are not whole."""
    return {name: t for name, t in output.items() if isinstance(t, Tensor) and t.is_floating_point()}


def difference(ours: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of all outputs, each relative to its largest value."""
    pairs = zip(ours, expected, strict=True)
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1e-12)) for a, b in pairs)


def write_onnx(model: nn.Module, pixels: Tensor, names: Sequence[str], file: Path, dynamic: bool) -> None:
    """Write a model as ONNX.

    Raises:
        FlagError: If torch cannot export it.
    """
    if dynamic:  # a batch of one would be taken for a constant
        pixels = pixels.repeat(2, 1, 1, 1)
    shapes = ({0: Dim.DYNAMIC},) if dynamic else None
    try:
        program = torch.export.export(Outputs(model), (pixels,), dynamic_shapes=shapes)
        torch.onnx.export(program, (), file, input_names=["pixel_values"], output_names=list(names), verbose=False)
    except (RuntimeError, ValueError) as error:  # of torch.export and of torch.onnx
        merged = file.parents[1] / MERGED
        left = f"; the merged model is in {merged}" if merged.exists() else ""
        remedy = "; leave out --dynamic_batch" if dynamic else left
        raise FlagError(f"ONNX: torch cannot export this model ({str(error).splitlines()[0]}){remedy}") from error


def latencies(calls: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """The median time of each call in milliseconds."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP + repeats):
        for name, call in calls.items():  # by turns: what else the machine does slows all of them
            began = time.perf_counter()
            call()
            times[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(own[WARM_UP:]) for name, own in times.items()}


def check(what: str, differs: float, args: argparse.Namespace, work: Path) -> None:
    """Print how far an export is from the adapted model.

    Raises:
        FlagError: If that is too far.
    """
    print(f"{what}: largest relative difference from the adapted model {differs:.1e}")
    if not differs <= args.tolerance:
        raise FlagError(f"{what} differs by {differs:.1e}, more than --tolerance {args.tolerance:g}; it is in {work}")


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Export, check and time; gives what is written to `export.json`."""
    args = parse_arguments(arguments)
    products = Products(args.output_dir, (MERGED, ONNX, NUMBERS), NUMBERS, "an export", args.overwrite)
    adapted, size = adapted_model(args)
    base = copy.deepcopy(adapted).unload()
    merged, why = merge(copy.deepcopy(adapted), args.widen)
    merged.eval().requires_grad_(False)
    images = [finished(to_tensors(Sample(make_scene(i)["image"]), size))["image"] for i in range(args.batch_size)]
    pixels = torch.stack(images)
    expected = tensors_of(adapted(pixels))

    work = products.begin()
    (work / ONNX).mkdir()
    plain = merged
    if why:
        print(f"no merged model was written: {why}")
    else:
        merged.save_pretrained(work / MERGED)
        plain = type(merged).from_pretrained(work / MERGED).eval()
    differs = {MERGED: difference(Outputs(plain)(pixels), list(expected.values()))}
    check("merged", differs[MERGED], args, work)
    calls = {"base": base.eval(), "adapter on its base": adapted, "merged": merged}
    timed: dict[str, Callable[[], Any]] = {name: lambda m=model: m(pixels) for name, model in calls.items()}
    if find_spec("onnx") is None or find_spec("onnxscript") is None:
        (work / ONNX).rmdir()
        print("no ONNX file was written: pip install onnx onnxscript onnxruntime")
    else:
        file = work / ONNX / "model.onnx"
        write_onnx(merged, pixels, list(expected), file, args.dynamic_batch)
        if find_spec("onnxruntime") is None:
            print("the ONNX file was not checked: pip install onnxruntime")
        else:
            from onnxruntime import InferenceSession, SessionOptions

            options = SessionOptions()
            # Threads that wait for work by spinning would take the cores of the next model that is timed.
            options.add_session_config_entry("session.intra_op.allow_spinning", "0")
            session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
            given = {"pixel_values": pixels.numpy()}
            results = [torch.from_numpy(own) for own in session.run(None, given)]
            differs[ONNX] = difference(results, list(expected.values()))
            check("ONNX", differs[ONNX], args, file)
            timed["merged, ONNX"] = lambda: session.run(None, given)
    times = latencies(timed, args.repeats)
    print(
        f"milliseconds for {args.batch_size} image(s) of {size[0]} x {size[1]} on this CPU, medians of {args.repeats}:"
    )
    for name, own in times.items():
        print(f"  {name:<20} {own:8.1f}")
    numbers = {"difference": differs, "milliseconds": times, "batch_size": args.batch_size, "image_size": list(size)}
    products.put(numbers)
    print(f"exported to {args.output_dir}")
    return numbers


if __name__ == "__main__":
    with told(FlagError, OSError):
        main()
