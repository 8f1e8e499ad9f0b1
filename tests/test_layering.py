"""The package is a house with floors: imports point downward, and what is forbidden in the package stays out.

The imports are read from the syntax tree, so that one behind a function or an ``if TYPE_CHECKING`` counts as well.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "quatcache"

# Modules and subpackages directly under quatcache/, by floor. A name that is missing here fails the test: whoever adds
# a module decides where it lives.
FLOORS = {
    "errors": 1,
    "units": 1,
    "settings": 2,
    "canonical": 2,
    "keys": 2,
    "sequences": 2,
    "store": 3,
    "read_through": 4,
    "data": 4,
    "heads": 4,
    "losses": 4,
    "metrics": 4,
    "progress": 5,
    "encoders": 5,
    "embedding_cache": 5,
    "memoize": 5,
    "servable": 5,
    "servable_files": 5,
    "integrations": 6,
    "training": 6,
    "retrieval": 6,
    "serving": 6,
    "cli": 7,
    "demo": 7,
    "__main__": 7,
}
NEIGHBOURS_APART = 6  # on this floor the rooms do not know each other
ROOF = "quatcache"  # quatcache/__init__.py: it hands out public names and belongs to no floor
USERS = ("cli", "demo")  # they use the public names, as a user does

LIGHTNING = ("pytorch_lightning", "lightning", "lightning_fabric", "lightning_utilities")
MAY_IMPORT_LIGHTNING = ("quatcache.training", "quatcache.cli", "quatcache.demo")
PRIVATE_LIGHTNING = "quatcache.training.internals"  # the one module that knows Lightning's private names
# Private by name, yet torch's and not Lightning's: there is no public way to tell DDP what to leave alone, nor to ask
# how often a tensor was written to.
PRIVATE_TORCH = {"_set_params_and_buffers_to_ignore_for_model", "_version"}

RUNS_CODE_FROM_DATA = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "cloudpickle"}
LONGEST = 350


def modules() -> dict[str, ast.Module]:
    """Every module of the package by dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    return found


MODULES = modules()


def is_package(name: str) -> bool:
    return (PACKAGE.parent.joinpath(*name.split(".")) / "__init__.py").exists()


def imported(name: str, tree: ast.Module) -> Iterator[str]:
    """Dotted names that a module imports, each resolved to the module that is meant where the package has it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = name.split(".") if is_package(name) else name.split(".")[:-1]
                parts = parts[: len(parts) - (node.level - 1)]
                base = ".".join([*parts, base] if base else parts)
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield whole if whole in MODULES else base


def room(name: str) -> str:
    """The part directly under quatcache/ that a module belongs to."""
    return name.split(".")[1] if "." in name else ROOF


def within(name: str, places: tuple[str, ...]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def inner_imports(name: str) -> set[str]:
    return {target for target in imported(name, MODULES[name]) if target.split(".")[0] == "quatcache"} - {name}


def test_every_part_of_the_package_has_a_floor():
    assert {room(name) for name in MODULES} - {ROOF} <= set(FLOORS)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {ROOF}))
def test_imports_point_downward(name):
    own = FLOORS[room(name)]
    for target in inner_imports(name):
        if target == ROOF:
            assert room(name) in USERS, f"{name} imports the roof, quatcache itself; import the module behind the name"
            continue
        if room(target) == room(name):
            continue
        floor = FLOORS[room(target)]
        assert floor <= own, f"{name} (floor {own}) imports {target} (floor {floor}): an arrow upward"
        assert not floor == own == NEIGHBOURS_APART, f"{name} imports its neighbour {target} on floor {own}"


def test_imports_have_no_circle():
    # A module also runs the __init__ of every package above what it imports, but only names that it asks for there
    # could be missing; so the edges are the imports themselves.
    edges = {name: inner_imports(name) & set(MODULES) for name in MODULES if name != ROOF}
    finished: set[str] = set()

    def walk(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, "a circle of imports: " + " -> ".join([*path[path.index(name) :], name])
        if name not in finished:
            for target in sorted(edges.get(name, ())):
                walk(target, (*path, name))
            finished.add(name)

    for name in sorted(edges):
        walk(name, ())


def test_lightning_is_imported_in_its_places_only():
    users = {name for name, tree in MODULES.items() if any(within(x, LIGHTNING) for x in imported(name, tree))}
    strays = {name for name in users if not within(name, MAY_IMPORT_LIGHTNING)}
    assert not strays


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names_defined(tree: ast.Module) -> set[str]:
    """Private names that the package itself defines: functions, classes, assigned attributes, class-level fields."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            found.add(node.attr)
    return {name for name in found if is_private(name)}


def test_private_names_of_lightning_are_known_to_one_module_only():
    own = PRIVATE_TORCH.union(*(private_names_defined(tree) for tree in MODULES.values()))
    strays = []
    for name, tree in MODULES.items():
        if name == PRIVATE_LIGHTNING or not within(name, MAY_IMPORT_LIGHTNING):
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr) and node.attr not in own:
                strays.append(f"{name}:{node.lineno} uses {node.attr}")
            if isinstance(node, ast.ImportFrom) and within(node.module or "", LIGHTNING):
                parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
                strays += [f"{name}:{node.lineno} imports {part}" for part in parts if is_private(part)]
    assert not strays


@pytest.mark.parametrize("name", sorted(MODULES))
def test_nothing_in_the_package_runs_code_that_came_as_data(name):
    tree = MODULES[name]
    forbidden = {target for target in imported(name, tree) if target.split(".")[0] in RUNS_CODE_FROM_DATA}
    assert not forbidden, f"{name} imports {forbidden}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called not in {"eval", "exec", "__import__"}, f"{name}:{node.lineno} calls {called}"
        if called in {"torch.load", "np.load", "numpy.load"}:
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            safe = given.get("weights_only") == "True" or given.get("allow_pickle") == "False"
            assert safe, f"{name}:{node.lineno} calls {called} in a way that can unpickle"


@pytest.mark.parametrize("name", sorted(MODULES))
def test_no_module_outgrows_a_sitting(name):
    path = PACKAGE.parent.joinpath(*name.split("."))
    path = path / "__init__.py" if is_package(name) else path.with_suffix(".py")
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_importing_the_package_loads_neither_torch_nor_lightning():
    # In a process of its own: this one has loaded both long ago.
    code = "import sys, quatcache; print(sorted({'torch', 'pytorch_lightning', 'lightning'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, stdout=subprocess.PIPE, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
