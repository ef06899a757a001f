"""Run the test suite with other versions than those that `constraints.txt` pins.

    python tests/versions.py oldest [options of pytest]       # the oldest versions that pyproject.toml admits
    python tests/versions.py newest [options of pytest]       # the newest
    python tests/versions.py oldest-torch [...]               # torch alone; also transformers, peft, accelerate
    python tests/versions.py newest-peft [...]
    python tests/versions.py torch==2.9.1,peft==0.21.0 [...]  # any others, separated by commas

An environment of its own is made in `build/`, with everything else as in `constraints.txt`. At the end stands a row
for the table in docs/compatibility.md; with `--record` as the first option it is written there. `make test` runs what
is pinned.
"""

from __future__ import annotations

import datetime
import json
import re
import subprocess
import sys
import tomllib
import venv
import xml.etree.ElementTree as ET
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "docs" / "compatibility.md"
# huggingface_hub moves with transformers, which sets its lowest version.
VARIED = ("torch", "transformers", "peft", "huggingface_hub", "accelerate")
# What must move with a package: its own requirements, and what limits it. `constraints.txt` pins them otherwise.
HUB = ("huggingface_hub", "datasets", "gradio", "gradio_client", "hf-gradio", "fsspec", "typer")
MOVES = {
    "torch": ("sympy",),
    "transformers": ("tokenizers", "safetensors", *HUB),
    "huggingface_hub": HUB,
    "peft": (),
    "accelerate": (),
}


def admitted() -> dict[str, Requirement]:
    """The ranges of the varied packages, from `pyproject.toml`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in project["dependencies"]]
    return {r.name: r for r in requirements if r.name in VARIED}


def wanted(which: str) -> dict[str, str]:
    """For each package that differs from `constraints.txt`, its version specifier."""
    if "==" in which:
        given = [Requirement(part) for part in which.split(",")]
        return {r.name: str(r.specifier) for r in given}
    age, _, alone = which.partition("-")
    if age not in ("oldest", "newest") or alone not in ("", *VARIED):
        sys.exit(__doc__)
    ranges = {name: r.specifier for name, r in admitted().items() if alone in ("", name)}
    if age == "newest":
        return {name: str(specifier) for name, specifier in ranges.items()}
    return {
        name: "==" + next(s.version for s in specifier if s.operator == ">=") for name, specifier in ranges.items()
    }


def constraints(specifiers: dict[str, str]) -> list[str]:
    """The lines of `constraints.txt`, with these specifiers in place of their pins."""
    free = {name.lower() for package in specifiers for name in (package, *MOVES[package])}
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    kept = [line for line in lines if line.partition("==")[0].lower() not in free]
    return [*kept, *(f"{name}{specifier}" for name, specifier in specifiers.items())]


def environment(which: str) -> Path:
    """The Python of an environment with these versions."""
    folder = ROOT / "build" / re.sub(r"[^\w.-]+", "_", which)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "constraints.txt"
    file.write_text("\n".join(constraints(wanted(which))) + "\n")
    python = folder / "venv" / "bin" / "python"
    if not python.exists():
        venv.create(folder / "venv", with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--constraint", file]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, "--upgrade", "--editable", f"{ROOT}[dev]"], check=True)
    return python


def versions(python: Path) -> dict[str, str]:
    """The versions in an environment, with that of Python."""
    code = (
        "import importlib.metadata, json, platform\n"
        f"found = {{name: importlib.metadata.version(name) for name in {VARIED}}}\n"
        "print(json.dumps(found | {'python': platform.python_version()}))"
    )
    found: dict[str, str] = json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True).stdout)
    return found


def row(which: str, found: dict[str, str], report: Path) -> str:
    """The row of the table: the versions, and what the tests gave."""
    suites = list(ET.parse(report).getroot().iter("testsuite"))
    total, failed, skipped = (
        sum(int(suite.get(name, 0)) for name in names for suite in suites)
        for names in (("tests",), ("failures", "errors"), ("skipped",))
    )
    cells = [which, *(found[name] for name in (*VARIED, "python")), total - failed - skipped, failed, skipped]
    return "| " + " | ".join(str(cell) for cell in (*cells, datetime.date.today().isoformat())) + " |"


def record(line: str) -> None:
    """Write a row into the table, in place of the one of the same name."""
    name = line.split("|")[1]
    lines = TABLE.read_text().splitlines()
    rows = [i for i, text in enumerate(lines) if text.startswith("|") and text.count("|") == line.count("|")]
    same = [i for i in rows if lines[i].split("|")[1] == name]
    if same:
        lines[same[0]] = line
    else:
        lines.insert(rows[-1] + 1, line)
    TABLE.write_text("\n".join(lines) + "\n")


def main() -> int:
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    which, options = sys.argv[1], sys.argv[2:]
    records = options[:1] == ["--record"]
    python = environment(which)
    found = versions(python)
    print(found, flush=True)
    report = python.parents[2] / "report.xml"
    done = subprocess.run([python, "-m", "pytest", f"--junitxml={report}", *options[records:]], cwd=ROOT)
    if report.exists():
        line = row(which, found, report)
        print(line)
        if records:
            record(line)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
