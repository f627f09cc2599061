"""The import rule of the design: scripts -> nodes -> {harness, attack}; attack -> {harness.wire, harness.models}."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("harness", "nodes", "attack")


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything of the project that a file imports."""
    package = file.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name.split(".")[0] in (*ROOMS, "scripts", "tests"))


def allowed(importer: str, name: str) -> bool:
    if importer.startswith("harness/wire/"):
        return name.startswith("harness.wire")
    if importer.startswith("harness/"):
        return name.startswith("harness.")
    if importer.startswith("attack/"):
        return name.startswith(("attack.", "harness.wire", "harness.models"))
    return name.split(".")[0] in ROOMS


FILES = sorted(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))


def test_every_room_is_looked_at() -> None:
    assert {file.relative_to(ROOT).parts[0] for file in FILES} == set(ROOMS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_keep_to_the_rule(file: Path) -> None:
    importer = str(file.relative_to(ROOT))
    broken = [f"{importer}:{line} imports {name}" for line, name in imports(file) if not allowed(importer, name)]
    assert not broken


def test_the_rule_can_be_broken(tmp_path: Path) -> None:
    assert not allowed("attack/shadow.py", "harness.training.Trainer")
    assert not allowed("harness/config.py", "nodes.cli")
    assert not allowed("harness/wire/layout.py", "harness.errors")
    assert allowed("attack/shadow.py", "harness.models.load_optimizer")


def test_harness_is_a_docstring() -> None:
    body = ast.parse((ROOT / "harness" / "__init__.py").read_text()).body
    assert len(body) == 1 and isinstance(body[0], ast.Expr)
