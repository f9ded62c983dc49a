"""docs/environment.md names every environment variable that the source reads or sets, and no other."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/environment.md").read_text()
NAME = re.compile(r"[A-Z][A-Z0-9_]+")


def _is_environ(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "environ"


def _keys(node: ast.AST, constants: dict[str, ast.Dict]) -> Iterator[str]:
    """Keys of a dict, written there or under a name."""
    if isinstance(node, ast.Name) and node.id in constants:
        node = constants[node.id]
    if isinstance(node, ast.Dict):
        for key in node.keys:
            if isinstance(key, ast.Constant):
                yield str(key.value)


def _in_python(path: Path, constants: dict[str, ast.Dict]) -> Iterator[str]:
    """Names in environ.get(NAME), environ[NAME], getenv(NAME), environ | {NAME: ...} and {**environ, NAME: ...}."""
    for node in ast.walk(ast.parse(path.read_text())):
        argument: ast.AST | None = None
        if isinstance(node, ast.Call) and node.args and isinstance(node.func, ast.Attribute):
            if _is_environ(node.func.value) or node.func.attr == "getenv":
                argument = node.args[0]
        elif isinstance(node, ast.Subscript) and _is_environ(node.value):
            argument = node.slice
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and _is_environ(node.left):
            yield from _keys(node.right, constants)
        elif isinstance(node, ast.AugAssign) and _is_environ(node.target):
            yield from _keys(node.value, constants)
        elif isinstance(node, ast.Dict) and any(
            key is None and _is_environ(value) for key, value in zip(node.keys, node.values, strict=True)
        ):
            yield from _keys(node, constants)
        if isinstance(argument, ast.Constant):
            yield str(argument.value)


def _constants(files: list[Path]) -> dict[str, ast.Dict]:
    """Dicts that modules keep under a name in capitals: they may be put into the environment elsewhere."""
    return {
        target.id: node.value
        for file in files
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)
        for target in node.targets
        if isinstance(target, ast.Name) and target.id.isupper()
    }


@cache
def _in_source() -> frozenset[str]:
    folders = [ROOT / name for name in ("lct_fast", "kernels", "benchmarks")]
    files = [ROOT / "setup.py", *(f for folder in folders for f in sorted(folder.rglob("*.py")))]
    constants = _constants(files)
    names = {name for file in files for name in _in_python(file, constants)}
    for file in (ROOT / "csrc").rglob("*.*"):
        names |= set(re.findall(r'getenv\("(\w+)"\)', file.read_text()))
    makefile = (ROOT / "Makefile").read_text()
    names |= set(re.findall(r"^([A-Z_]+) \?=", makefile, re.M))
    return frozenset(names | set(re.findall(r"\b([A-Z_]{3,})=\w", makefile)))


def _section(heading: str) -> set[str]:
    """Variables in the first column of the table under ``heading``."""
    table = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return {name for cell in cells for name in re.findall(r"`([A-Z0-9_]+)`", cell)}


def test_the_tables_are_those_of_the_source() -> None:
    found = _in_source()
    assert all(NAME.fullmatch(name) for name in found) and len(found) > 15
    named = (
        _section("Of this project") | _section("Of others, read here too") | _section("Of others, set here")
    )
    assert named == found


def test_other_pages_name_no_other_variable() -> None:
    """What looks like one: capitals with an underscore, in backticks, alone or with a value."""
    known = _in_source() | _section("Of others, worth knowing")
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`([A-Z]+_[A-Z0-9_]+)(?:=[^`]*)?`", page.read_text()):
            assert name in known, f"{page.name}: {name}"
