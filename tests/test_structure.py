"""The rooms of the package, and which may know which."""

import ast
from pathlib import Path

import pytest

import sfa_peft

ROOT = Path(sfa_peft.__file__).parent

# Each room may know those before it, and itself.
ROOMS = [
    "layers",
    "checkpoint",
    "ticket",
    "config",
    "recorded",
    "planning",
    "tuner",
    "search",
    "hub",
    "compat",
    "cli",
    "sfa_peft",
]


def modules():
    """Every module of the package, by its name without `sfa_peft.`."""
    paths = {path.relative_to(ROOT).with_suffix(""): path for path in ROOT.rglob("*.py")}
    return {".".join(name.parts).removesuffix(".__init__"): path for name, path in paths.items()}


def imports_of(name, path, known):
    """The modules of the package that a module imports, wherever it does: at the top, in functions, for types."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [part for part in package if part != "__init__"]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            source = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:
                inner = f"{source}.{alias.name}".strip(".")
                found.add(inner if inner in known else source or "__init__")
        elif isinstance(node, ast.ImportFrom | ast.Import):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            assert not any(other.split(".")[0] == "sfa_peft" for other in names), f"{name} imports absolutely"
    return found - {name}


@pytest.fixture(scope="module")
def imports():
    known = modules()
    return {name: imports_of(name, path, known) for name, path in known.items()}


def room_of(name):
    return "sfa_peft" if name == "__init__" else name.split(".")[0]


def test_a_room_knows_only_those_before_it(imports):
    wrong = [
        f"{name} imports {other}"
        for name, others in imports.items()
        for other in others
        if ROOMS.index(room_of(other)) > ROOMS.index(room_of(name))
    ]
    assert wrong == []


def test_no_module_imports_itself_in_a_circle(imports):
    left = {name: set(others) for name, others in imports.items()}
    while True:
        free = {name for name, others in left.items() if not others & left.keys()}
        if not free:
            break
        left = {name: others for name, others in left.items() if name not in free}
    assert left == {}


def test_every_room_says_what_it_is_for():
    for path in modules().values():
        assert ast.get_docstring(ast.parse(path.read_text())), path
