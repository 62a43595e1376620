"""Imports go one way: between the packages, and between the folders of upit/.

lightning_modules, datamodules and callbacks import upit and never one another. A folder of upit/ imports itself and
those before it in ``FOLDERS``. All imports count: those in functions and under TYPE_CHECKING too.
"""

import ast
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"upit", "lightning_modules", "datamodules", "callbacks"}
FOLDERS = (
    "core", "model", "preparation", "expansion", "router_init", "upcycling", "evaluation", "report", "offline", "cli",
)  # fmt: skip
FACES = ("preparation", "expansion", "router_init", "upcycling")
ALLOWED: dict[str, str] = {}  # file: a module that it imports against the order, with the reason


def imported(file: Path) -> set[str]:
    """The dotted names that a file imports, ``from a import b`` as ``a.b``."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("package", sorted(PACKAGES))
def test_packages_import_one_way(package):
    allowed = {package} if package == "upit" else {package, "upit"}
    files = [file for file in (ROOT / package).rglob("*.py") if not file.is_relative_to(ROOT / "upit/cli")]
    assert files
    for file in files:
        found = {name.split(".")[0] for name in imported(file)}
        assert found & PACKAGES <= allowed, file
        if package == "upit":
            assert not found & {"lightning", "pytorch_lightning"}, file


def test_every_module_lies_in_a_folder():
    assert {file.name for file in (ROOT / "upit").glob("*.py")} == {"__init__.py", "__main__.py"}
    assert {file.parent.name for file in (ROOT / "upit").glob("*/*.py")} == set(FOLDERS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_imports_those_before_it(folder):
    after = set(FOLDERS[FOLDERS.index(folder) + 1 :])
    for file in (ROOT / "upit" / folder).rglob("*.py"):
        for name in imported(file):
            package, _, rest = name.partition(".")
            if package == "upit" and rest.split(".")[0] in after:
                where = str(file.relative_to(ROOT))
                assert name.startswith(ALLOWED.get(where, "nothing")), f"{where} imports {name}"


@pytest.mark.parametrize("folder", FACES)
def test_a_face_offers_classes_alone(folder):
    """Else a function would hide the module of its name."""
    face = import_module(f"upit.{folder}")
    assert face.__all__
    for name in face.__all__:
        assert isinstance(getattr(face, name), type), name
        assert getattr(face, name).__module__.startswith(f"upit.{folder}."), name


def test_tests_mirror_the_folders():
    for file in (ROOT / "tests/upit").rglob("test_*.py"):
        folder = file.parent.relative_to(ROOT / "tests/upit")
        assert folder.parts, f"{file.name} lies in no folder"
        assert (ROOT / "upit" / folder).is_dir(), file
