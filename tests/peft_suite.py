"""PEFT's own test suite, run on SFA: `python tests/peft_suite.py [options of pytest]`, some 15 minutes.

PEFT's source distribution of the installed version is fetched with pip, SFA is added to the cases of its tests for
custom models, and those cases are run. Not part of `make test`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path

SUITE = "tests/test_custom_models.py"
BOTH = {"internal_density": 0.5, "external_width": 2}
INTERNAL = {"internal_density": 0.5, "external_modules": []}
EXTERNAL = {"target_modules": [], "external_width": 2}


def on(*modules: str) -> dict[str, list[str]]:
    return {"target_modules": list(modules), "external_modules": list(modules)}


# The model is one of PEFT's own.
CASES = {
    "Vanilla MLP 1 SFA": ("MLP", {"target_modules": "lin0"}),
    "Vanilla MLP 2 SFA": ("MLP", INTERNAL | {"target_modules": ["lin0"]}),
    "Vanilla MLP 3 SFA": ("MLP", on("lin1") | BOTH),
    "Vanilla MLP 4 SFA": ("MLP", on("lin0", "lin1") | BOTH | {"external_modules": ["lin0"]}),
    "Vanilla MLP 5 SFA": ("MLP", EXTERNAL | {"external_modules": ["lin0"]}),
    "Vanilla MLP 6 SFA": ("MLP", on("lin0") | BOTH | {"modules_to_save": ["lin1"]}),
    "Vanilla MLP 7 SFA": ("MLP", on("lin0") | {"budget": 200}),
    "Conv2d 1 SFA": ("Conv2d", on("conv2d") | BOTH),
    "Conv2d 2 SFA": ("Conv2d", INTERNAL | {"target_modules": ["conv2d", "lin0"]}),
    "Conv2d Groups SFA": ("Conv2dGroups", on("conv2d") | BOTH),
    "Conv2d Groups2 SFA": ("Conv2dGroups2", on("conv2d") | BOTH),
    "Conv2d2 SFA": ("Conv2d2", on("conv2d") | BOTH),
    "LayerNorm SFA": ("MLP_LayerNorm", on("layernorm0") | BOTH),
}
UNLIKE_THE_BASE = {"init_weights": False}
SEVERAL_ACTIVE = {
    "SFA Same": (on("lin0") | BOTH, on("lin0") | BOTH),
    "SFA Different": (on("lin0") | BOTH, on("lin1") | BOTH),
    "SFA Kinds": (INTERNAL | {"target_modules": ["lin0"]}, EXTERNAL | {"external_modules": ["lin0"]}),
}
MEANT = {
    "test_save_pretrained_adapter_name_substring": "a file packs all internal adapters into two tensors",
    "test_save_pretrained_pickle": "a checkpoint is safetensors, never a pickle",
}


def unpacked(folder: Path) -> Path:
    """PEFT's source distribution of the installed version, in a folder."""
    wanted = f"peft=={version('peft')}"
    options = ["--disable-pip-version-check", "--quiet", "--no-deps", "--no-binary=:all:", f"--dest={folder}", wanted]
    subprocess.run([sys.executable, "-m", "pip", "download", *options], check=True)
    with tarfile.open(next(folder.glob("peft-*.tar.gz"))) as file:
        file.extractall(folder, filter="data")
    return next(path for path in folder.glob("peft-*") if path.is_dir())


def add_cases(suite: Path) -> None:
    lines = {
        "TEST_CASES = [": [
            f"({name!r}, {model!r}, SFAConfig, {options!r})," for name, (model, options) in CASES.items()
        ],
        "MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES = [": [
            f"({name!r}, 'sfa', SFAConfig, {a | UNLIKE_THE_BASE!r}, {b | UNLIKE_THE_BASE!r}),"
            for name, (a, b) in SEVERAL_ACTIVE.items()
        ],
    }
    text = suite.read_text()
    for start, own in lines.items():
        text = text.replace(f"\n{start}\n", "\n".join(["", start, *own, ""]), 1)
    text = text.replace("\nfrom peft import (", "\nfrom sfa_peft import SFAConfig\nfrom peft import (", 1)
    suite.write_text(text)


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        root = unpacked(Path(folder))
        (root / "tests" / "__init__.py").touch()
        (root / "pyproject.toml").unlink()  # asks for plugins of pytest
        # The suite imports it for tests of other models.
        (root / "diffusers.py").write_text("StableDiffusionPipeline = object\n")
        add_cases(root / SUITE)
        meant = "".join(f" and not {name}" for name in MEANT)
        command = [sys.executable, "-m", "pytest", SUITE, "-q", "--tb=short", "-p", "no:warnings", f"-kSFA{meant}"]
        return subprocess.run(
            [*command, *sys.argv[1:]], cwd=root, env=os.environ | {"PYTHONPATH": str(root)}
        ).returncode


if __name__ == "__main__":
    sys.exit(main())
