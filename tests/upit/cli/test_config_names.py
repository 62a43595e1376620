"""Configs by name: which file a name means, on the command line too; listing, showing and copying."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import upit.cli.main
import upit.cli.sweep
from upit.cli.config_names import find, names
from upit.cli.main import main

ROOT = Path(__file__).parents[3]
CONFIGS = ROOT / "configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory without any configs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    return tmp_path


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return file


def run(args: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["upit", *args])
        main()


def error_of(args: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as stop:
        run(args)
    assert stop.value.code == 2
    return capsys.readouterr().err


# --- which file ---------------------------------------------------------------------------------------


def test_a_path_goes_before_a_local_name_and_that_before_the_packaged_one():
    assert find("quickstart") == find("quickstart.yaml") == CONFIGS / "quickstart.yaml"
    assert find("ablations/random_parents") == CONFIGS / "ablations/random_parents.yaml"
    local = write(Path("configs/quickstart.yaml"), "")
    assert find("quickstart") == find("quickstart.yaml") == local
    assert find("ablations/random_parents") == CONFIGS / "ablations/random_parents.yaml"
    path = write(Path("quickstart.yaml"), "")
    assert find("quickstart.yaml") == path
    assert find("quickstart") == local
    Path("smollm2").mkdir()  # a directory is no config
    assert find("smollm2") == CONFIGS / "smollm2.yaml"


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("quickstrat", "quickstart"),
        ("random_parents", "ablations/random_parents"),
        ("configs/baselines/vanila.yaml", "baselines/vanilla"),
        ("mine/tuned2", "mine/tuned"),
    ],
)
def test_an_unknown_name_is_answered_with_similar_ones(wrong, right):
    write(Path("configs/mine/tuned.yaml"), "")
    with pytest.raises(FileNotFoundError, match=rf"config '{wrong}' is neither .* similar names: .*\b{right}\b"):
        find(wrong)


def test_a_name_like_no_other_is_answered_with_where_names_are_listed():
    with pytest.raises(FileNotFoundError, match="`upit configs` lists the names"):
        find("0123456789")


# --- the command line ---------------------------------------------------------------------------------


def test_fit_takes_names_paths_and_yaml(capsys):
    stack = ["-c", "quickstart", "--config=ablations/random_parents", "-c", "seed_everything: 7"]
    write(Path("mine.yaml"), "trainer: {max_steps: 11}")
    with pytest.raises(SystemExit) as stop:
        run(["fit", *stack, "-c", "mine.yaml", "--print_config"])
    assert not stop.value.code
    shown = capsys.readouterr().out
    for line in ("seed_everything: 7", "class_path: upit.expansion.RandomParents", "max_steps: 11", "num_experts: 6"):
        assert line in shown


@pytest.mark.parametrize("command", ["fit", "validate", "expand"])
def test_every_command_with_configs_names_an_unknown_one(command, capsys):
    assert "config 'quickstrat' is neither" in error_of([command, "--config", "quickstrat"], capsys)


def test_sweep_takes_names(monkeypatch, capsys):
    swept, output = [], ["--seeds", "0", "--output", "out"]
    monkeypatch.setattr(upit.cli.main, "check_config", lambda arguments: None)
    monkeypatch.setattr(upit.cli.sweep, "sweep", lambda cells, *_, **__: swept.extend(cells))
    run(["sweep", "-c", "quickstart", "--configs", "baselines/vanilla", *output])
    assert [cell.config for cell in swept] == ["quickstart", "vanilla"]
    files = [CONFIGS / "quickstart.yaml", CONFIGS / "baselines/vanilla.yaml"]
    assert swept[1].arguments == ("-c", str(files[0]), "-c", str(files[1]))
    error = error_of(["sweep", "-c", "quickstart", "--configs", "vanila", *output], capsys)
    assert "--configs: config 'vanila' is neither a file nor the name of a config; similar names: " in error


# --- upit configs -------------------------------------------------------------------------------------


def test_every_config_begins_with_a_line_about_it():
    for name, file in names(CONFIGS).items():
        first = file.read_text().splitlines()[0]
        assert first.startswith("# "), name
        assert first[-1] in ".?", f"{name}: the first line is shown by itself: {first}"


def test_the_list_has_every_name_once_and_imports_no_torch():
    write(Path("configs/quickstart.yaml"), "# Mine.\n")
    write(Path("configs/own/bare.yaml"), "seed_everything: 1\n")
    script = (
        "import sys\nfrom upit.cli.main import main\nmain(['configs'])\n"
        "assert not {'torch', 'lightning'} & set(sys.modules), 'slow list'"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    local, packaged = done.stdout.split("Packaged with upit:\n")
    entries = [line.split(maxsplit=1) for line in local.splitlines() if line.startswith("  ")]
    assert entries == [["quickstart", "Mine."], ["own/bare"]]
    assert [line.split()[0] for line in packaged.splitlines() if line.startswith("  ")] == [*names(CONFIGS)][1:]
    assert re.search(r"\n  ablations/random_parents +Expansion merges random pairs, not .*\.\n", packaged)


def test_a_config_is_shown_as_it_is(capsys):
    run(["configs", "baselines/vanilla"])
    assert capsys.readouterr().out.strip() == (CONFIGS / "baselines/vanilla.yaml").read_text().strip()
    assert "similar names: baselines/vanilla" in error_of(["configs", "vanilla", "--copy", "here"], capsys)


def test_copies_keep_their_names_and_replace_nothing(capsys):
    run(["configs", "quickstart", "ablations/random_parents", "--copy", "configs"])
    assert {*names(Path("configs"))} == {"quickstart", "ablations/random_parents"}
    assert find("quickstart").read_text() == (CONFIGS / "quickstart.yaml").read_text()
    assert find("quickstart") == Path("configs/quickstart.yaml")
    Path("configs/quickstart.yaml").write_text("# Edited.\n")
    error = error_of(["configs", "--copy", "configs"], capsys)
    assert "configs/ablations/random_parents.yaml exists already" in error
    assert "configs/quickstart.yaml" in error
    assert {*names(Path("configs"))} == {"quickstart", "ablations/random_parents"}
    run(["configs", "--copy", "all"])
    assert {name: file.read_text() for name, file in names(Path("all")).items()} == {
        name: file.read_text() for name, file in names(CONFIGS).items()
    }


def test_one_config_is_copied_to_a_file(capsys):
    run(["configs", "ablations/ties_merge", "--copy", "deep/mine.yaml"])
    assert Path("deep/mine.yaml").read_text() == (CONFIGS / "ablations/ties_merge.yaml").read_text()
    assert "is one file, for 2 configs" in error_of(["configs", "quickstart", "smollm2", "--copy", "x.yaml"], capsys)
    assert not Path("x.yaml").exists()
