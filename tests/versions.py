"""Run the test suite with the oldest PEFT and transformers that are admitted, or with the newest.

    python tests/versions.py oldest [options of pytest]
    python tests/versions.py newest [options of pytest]

An environment of its own is made in `build/`, with everything else as in `constraints.txt`. `make test` runs what is
pinned there.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import venv
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
VARIED = ("peft", "transformers")


def admitted() -> dict[str, Requirement]:
    """The ranges that are varied, from `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    return {r.name: r for r in requirements if r.name in VARIED}


def constraints(which: str) -> list[str]:
    """The constraints file, with the varied ranges in place of their pins."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if re.split("[=<>]", line)[0].lower() not in VARIED]
    for name, requirement in admitted().items():
        if which == "newest":
            kept.append(f"{name}{requirement.specifier}")
        else:
            lowest = next(s.version for s in requirement.specifier if s.operator == ">=")
            kept.append(f"{name}=={lowest}")
    return kept


def environment(which: str) -> Path:
    """The Python of an environment with these versions."""
    folder = ROOT / "build" / which
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "constraints.txt"
    file.write_text("\n".join(constraints(which)) + "\n")
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--constraint", file]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, "--upgrade", "--editable", f"{ROOT}[dev]"], check=True)
    return python


def main() -> int:
    if len(sys.argv) < 2 or sys.argv[1] not in ("oldest", "newest"):
        sys.exit(__doc__)
    python = environment(sys.argv[1])
    shown = "; ".join(f"print('{name}', importlib.metadata.version('{name}'))" for name in VARIED)
    subprocess.run([python, "-c", f"import importlib.metadata; {shown}"], check=True)
    return subprocess.run([python, "-m", "pytest", *sys.argv[2:]], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
