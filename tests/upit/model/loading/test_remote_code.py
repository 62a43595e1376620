"""Code that comes with a model's folder runs only where ``trust_remote_code`` is set, and nobody is asked."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[4]
PACKAGES = ("upit", "lightning_modules", "datamodules", "callbacks")


def test_every_loader_says_whether_it_trusts():
    """transformers asks on standard input where the argument is left out."""
    calls = 0
    for file in (file for package in PACKAGES for file in (ROOT / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            owner = node.func.value
            if node.func.attr == "from_pretrained" and isinstance(owner, ast.Name) and owner.id.startswith("Auto"):
                calls += 1
                assert "trust_remote_code" in {argument.arg for argument in node.keywords}, f"{file}:{node.lineno}"
    assert calls > 5


@pytest.fixture
def foreign(tmp_path) -> Path:
    """A model's folder whose config needs code that it brings along; the code leaves a mark when it runs."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (folder / "config.json").write_text(json.dumps({"model_type": "foreign", "auto_map": auto_map}))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'code-ran')!r}, 'w').close()\n")
    return folder


@pytest.mark.slow
def test_stages_on_files_run_no_foreign_code_even_if_told_yes(foreign, tmp_path):
    stages = {
        "inspect": [str(foreign)],
        "expand": [
            f"--base={foreign}", f"--experts=[{foreign}]", "--num_experts=2", f"--output={tmp_path / 'out'}",
        ],
        "upcycle": [f"--base={foreign}", f"--experts=[{foreign}]", f"--output={tmp_path / 'out'}"],
    }  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "upit", stage, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment,
        )
        for stage, arguments in stages.items()
    ]  # fmt: skip
    for stage, process in zip(stages, running, strict=True):
        output, _ = process.communicate("y\ny\n", timeout=120)
        assert process.returncode != 0, stage
        assert f"upit {stage}: error" in output, output
    assert not (tmp_path / "code-ran").exists()
