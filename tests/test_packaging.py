"""What travels: the configs in sdist and wheel, and which dependencies an installation has."""

import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CONFIGS = {str(file.relative_to(ROOT / "configs")): file.read_text() for file in (ROOT / "configs").rglob("*.yaml")}
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE")
FOLDERS = ("configs", "upit", "lightning_modules", "datamodules", "callbacks")


def build(kind: str, source: Path, output: Path) -> Path:
    """Build in a folder as pip does, but with the setuptools that is installed."""
    script = f"from setuptools import build_meta\nprint(build_meta.build_{kind}({str(output)!r}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return output / done.stdout.split()[-1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The content of a wheel that was built from the sdist. The source holds traces of an older build."""
    folder = tmp_path_factory.mktemp("packaging")
    source = folder / "source"
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    with tarfile.open(build("sdist", source, folder)) as sdist:
        sdist.extractall(folder, filter="data")
    unpacked = next(folder.glob("upit-*/"))
    stale = unpacked / "build/lib/upit/configs/removed_since.yaml"
    stale.parent.mkdir(parents=True)
    stale.write_text("")
    with zipfile.ZipFile(build("wheel", unpacked, folder)) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def test_an_installation_has_the_configs(installed):
    found = installed / "upit/configs"
    assert {str(file.relative_to(found)): file.read_text() for file in found.rglob("*.yaml")} == CONFIGS
    assert sorted(path.name for path in installed.iterdir() if path.suffix != ".dist-info") == sorted(FOLDERS[1:])


def test_an_installation_finds_its_configs_by_name(installed, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(installed))
    script = "from upit.cli.config_names import find\nprint(find('ablations/random_parents'))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert Path(done.stdout.strip()) == installed / "upit/configs/ablations/random_parents.yaml", done.stderr


def test_what_must_be_compiled_is_an_extra():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not any("reasoning" in name for name in project["dependencies"])
    assert any(name.startswith("reasoning-gym") for name in extras["demo"])
    assert not any(name.startswith("llm") for needed in extras.values() for name in needed)
