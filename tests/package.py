"""Build the package, and try it in new environments: `python tests/package.py [--newest]`, some minutes.

- The sdist and the wheel are built twice, and must be the same byte for byte; `twine check` must pass.
- The wheel is installed with its own requirements alone, as `constraints.txt` pins them, or with `--newest` without
  pins. There README's lines must run, the command must know its version, and an example must say what it lacks.
- The wheel is installed beside the oldest torch that it admits, which must stay, and README's lines must run there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from pathlib import Path

ROOT = Path(__file__).parents[1]
# A base and data on a stand-in for the Hub, and then README's Python.
README = """
import sys
sys.path[:0] = [{tests!r}]
import os
from hub_server import TOKEN, HubServer
hub = HubServer()
os.environ |= {{"HF_ENDPOINT": hub.url, "HF_HOME": {home!r}, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}}
import pages
(snippet,) = pages.snippets("README.md", "python")
snippet.run(pages.names_of_readme())
"""
INSTALL = 'pip install "sfa-peft[examples]"'


def run(*command: object, **options: object) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **options)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))[:300]}\n{done.stdout}\n{done.stderr}")
    return done.stdout


def environment(folder: Path) -> tuple[Path, list[object]]:
    """The folder of an environment's programs, and the command of its pip."""
    venv.create(folder, with_pip=True)
    programs = folder / "bin"
    return programs, [programs / "python", "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]


def build(folder: Path) -> Path:
    """Build twice, compare and check. The wheel."""
    programs, pip = environment(folder / "tools")
    run(*pip, "build", "twine")
    epoch = {"SOURCE_DATE_EPOCH": run("git", "log", "-1", "--format=%ct", cwd=ROOT).strip()}
    built = []
    for name in ("one", "two"):
        run(programs / "python", "-m", "build", "--outdir", folder / name, ROOT, env=os.environ | epoch)
        built.append({path.name: path.read_bytes() for path in sorted((folder / name).iterdir())})
    if built[0] != built[1]:
        sys.exit(f"two builds differ: {[name for name in built[0] if built[0][name] != built[1].get(name)]}")
    run(programs / "twine", "check", "--strict", *(folder / "one").iterdir())
    print(f"the same twice, and checked: {', '.join(built[0])}", flush=True)
    return next((folder / "one").glob("*.whl"))


def try_readme(programs: Path, folder: Path) -> None:
    script = folder / "readme.py"
    script.write_text(README.format(tests=str(ROOT / "tests"), home=str(folder / "home")))
    run(programs / "python", script, cwd=folder)


def try_alone(wheel: Path, folder: Path, options: list[object]) -> None:
    """The wheel with its own requirements alone."""
    programs, pip = environment(folder)
    run(*pip, *options, "torch")  # first: others would bring another build of it
    run(*pip, *options, wheel)
    try_readme(programs, folder)
    version = run(programs / "sfa-peft", "--version").strip()
    script = ROOT / "examples" / "semantic_segmentation.py"
    done = subprocess.run([programs / "python", script], capture_output=True, text=True, cwd=folder)
    if done.returncode == 0 or INSTALL not in done.stderr or "Traceback" in done.stderr:
        sys.exit(f"{script} does not say {INSTALL}:\n{done.stderr}")
    print(f"{version}: README's lines run with its own requirements alone", flush=True)


def try_beside_old_torch(wheel: Path, folder: Path) -> None:
    """The wheel beside a torch that is there already."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = next(m[1] for line in project["dependencies"] if (m := re.match(r"torch>=([\d.]+)", line)))
    programs, pip = environment(folder)
    run(*pip, f"torch=={oldest}.*", "numpy")
    shown = [programs / "python", "-c", "import importlib.metadata as m; print(m.version('torch'))"]
    before = run(*shown)
    run(*pip, wheel)
    if run(*shown) != before:
        sys.exit(f"torch {before} has become {run(*shown)}")
    try_readme(programs, folder)
    print(f"torch {before.strip()} stays, and README's lines run with it", flush=True)


def main() -> None:
    options: list[object] = [] if "--newest" in sys.argv[1:] else ["--constraint", ROOT / "constraints.txt"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        wheel = build(folder)
        try_alone(wheel, folder / "alone", options)
        try_beside_old_torch(wheel, folder / "old torch")


if __name__ == "__main__":
    main()
