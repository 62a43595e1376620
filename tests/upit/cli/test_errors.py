"""What the command line says about a wrong strategy."""

import importlib
import sys
from pathlib import Path

import pytest

from upit.cli.errors import explain
from upit.cli.main import main
from upit.cli.moved import MOVED

QUICKSTART = Path(__file__).parents[3] / "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--upcycling.router", "upit.router_init.Nope"],
            "upit.router_init.HiddenMean, upit.router_init.RandomRouter, upit.router_init.Ridge, ",
        ),
        (
            ["--upcycling.merge", "upit.expansion.Even"],
            "valid choices of Merge: upit.expansion.Dare, upit.expansion.DareTies, upit.expansion.Linear, ",
        ),
        (["--upcycling.merge", "upit.expansion.Ties", "--upcycling.merge.densty", "0.3"], "densty"),
        (["-c", "wrong.yaml"], "upit.expansion.Ties takes: density"),
        (["--seed_everything", "-1"], "error: seed_everything: -1 is not in bounds"),
        (["--upcycling.parents", "Bestt"], "valid choices of Parents: upit.expansion.BestParents, "),
        (["--upcycling.merge.drop_rate", "0.5"], "valid choices of Merge: upit.expansion.Dare, "),
        (["--model", "lightning_modules.Nope"], "valid choices of LightningModule: lightning_modules.DenseModule, "),
        (["--data.foo", "1"], "system_prompt, trust_remote_code, max_length, packing, "),
        (
            ["--upcycling.merge", "upit.expansion.Dare", "--upcycling.merge.drop_rate", "2"],
            "Dare.drop_rate=2.0 must lie in [0, 1)",
        ),
    ],
)
def test_says_what_would_be_right(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPIT_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "wrong.yaml").write_text(
        "upcycling: {merge: {class_path: upit.expansion.Ties, init_args: {densty: 0.3}}}"
    )
    monkeypatch.setattr(sys, "argv", ["upit", "fit", "-c", str(QUICKSTART), *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    text = capsys.readouterr().err
    assert said in text
    assert "Does not validate" not in text
    assert len(text) < 2500, "the usage of every option buries the error"


def test_classes_of_the_user_s_come_last_and_only_those_that_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "a_merge.py").write_text(
        "from upit.expansion.merging import Linear\n\n\nclass Own(Linear):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("a_merge").Own

    class Local(own):
        pass

    message = explain("'x.Nope' is not a class: No module <class 'upit.expansion.Merge'>")
    assert "valid choices of Merge: upit.expansion.Dare, " in message
    assert "upit.expansion.Ties, " in message
    assert "a_merge.Own" in message
    assert Local.__name__ not in message


def test_every_old_class_path_names_a_class_of_now():
    for old, new in MOVED.items():
        module, _, name = new.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), name), type), old


@pytest.mark.parametrize(
    ("argument", "old"),
    [
        ("--upcycling.merge", "upit.merging.Ties"),
        ("--upcycling.parents", "upit.selection.Random"),
        ("--upcycling.router", "upit.router_init.Random"),
        ("--upcycling.non_experts", "upit.non_experts.Last"),
    ],
)
def test_an_old_class_path_is_answered_by_the_new_one(argument, old, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UPIT_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    key = argument.rpartition(".")[2]
    file = tmp_path / "old.yaml"
    file.write_text(f"upcycling: {{{key}: {{class_path: {old}}}}}")
    for given in ([argument, old], ["-c", str(file)]):
        monkeypatch.setattr(sys, "argv", ["upit", "fit", "-c", str(QUICKSTART), *given])
        with pytest.raises(SystemExit, match="2"):
            main()
        assert capsys.readouterr().err.strip().split(": ", 1)[1] == f"error: {old} is now {MOVED[old]}"


def test_a_stage_answers_an_old_class_path_too(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["expand", "--base", "a", "--experts", "[a]", "--num_experts", "2", "--output", str(tmp_path / "out"),
              "--merge", "upit.merging.Ties"])  # fmt: skip
    error = capsys.readouterr().err + str(stop.value)
    assert "error: upit.merging.Ties is now upit.expansion.Ties" in error
