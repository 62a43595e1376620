"""Imports go one way: lightning_modules, datamodules and callbacks import upit and never one another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"upit", "lightning_modules", "datamodules", "callbacks"}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_imports_go_one_way(package):
    allowed = {package} if package == "upit" else {package, "upit"}
    for file in (ROOT / package).rglob("*.py"):
        found = imported(file)
        if file.name != "cli.py":
            assert found & PACKAGES <= allowed, file
        if package == "upit" and file.name != "cli.py":
            assert not found & {"lightning", "pytorch_lightning"}, file
