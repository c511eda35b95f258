"""Imports point one way, from what is general to what uses it."""

import ast
import graphlib
import pathlib

import pytest

import ppow_jax

PACKAGE = pathlib.Path(ppow_jax.__file__).parent
CONFIGS = PACKAGE.parent / "configs"
# Each may import those before it, and itself; for the rest see the tests.
ORDER = (
    "errors",
    "keys",
    "settings",
    "config",
    "parallel",
    "models",
    "targets",
    "serving",
    "drafters",
    "data",
    "decode",
    "objectives",
    "experiment",
    "training",
    "report",
    "stages",
    "run",
    "api",
    "main",
)
# May import anything but `main`, and nobody them.
COMMANDS = ("bench", "chat", "compile", "convert", "config_help", "doctor")
MAY_IMPORT_STAGES = ("stages", "run", "api", "bench", "chat", "compile", "doctor")


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    """`a.b` of `root/a/b.py`; a package's own name of its `__init__.py`."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path, PACKAGE.parent): path for path in PACKAGE.rglob("*.py")}


def imported(path: pathlib.Path) -> set[str]:
    """All that a file imports, wherever it does; `from a import b` is `a.b` where that is a module."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in names}
    return found


def part(module: str) -> str:
    """The folder or file of the package that a module belongs to; empty for the package itself."""
    return ".".join(module.split(".")[1:2])


EDGES = {
    (name, to) for name, path in MODULES.items() for to in imported(path) if to.split(".")[0] == "ppow_jax"
}


def test_every_part_of_the_package_has_its_place():
    assert {part(name) for name in MODULES} - {""} == {*ORDER, *COMMANDS}


def test_every_folder_is_a_package():
    """Or it would be missing from what `pip install` installs."""
    folders = {path.parent for path in MODULES.values()}
    assert [str(folder) for folder in folders if not (folder / "__init__.py").exists()] == []


def test_imports_point_one_way():
    wrong = [
        f"{name} imports {to}"
        for name, to in sorted(EDGES)
        if part(name) in ORDER
        and part(to) != part(name)
        and part(to) not in ORDER[: ORDER.index(part(name))]
        and to != "ppow_jax"
    ]
    assert wrong == []


def test_nobody_imports_main_and_only_commands_import_commands():
    wrong = [
        f"{name} imports {to}"
        for name, to in sorted(EDGES)
        if part(to) == "main" or (part(to) in COMMANDS and part(name) not in COMMANDS)
    ]
    assert wrong == []


def test_only_the_run_imports_stages():
    wrong = [
        f"{name} imports {to}"
        for name, to in sorted(EDGES)
        if part(to) == "stages" and part(name) not in MAY_IMPORT_STAGES
    ]
    assert wrong == []


def test_no_module_imports_configs():
    assert [f"{name} imports {to}" for name, to in sorted(EDGES) if part(to) == "configs"] == []


def test_modules_import_each_other_in_no_circle():
    graph = {name: {to for start, to in EDGES if start == name and to in MODULES} for name in MODULES}
    graph = {name: to - {"ppow_jax"} for name, to in graph.items()}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.py")), ids=lambda path: path.stem)
def test_configs_import_config_alone(path):
    allowed = {"ml_collections", "ppow_jax.config", "ppow_jax.configs"}
    found = imported(path)
    assert {to for to in found if to not in allowed and not to.startswith("ppow_jax.configs.")} == set()
