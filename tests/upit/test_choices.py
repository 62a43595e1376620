"""What the command line says about a wrong strategy."""

import importlib
import sys
from pathlib import Path

import pytest

from upit.choices import explain
from upit.cli import main

QUICKSTART = Path(__file__).parents[2] / "configs/quickstart.yaml"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["--upcycling.router", "upit.router_init.Nope"],
            "upit.router_init.HiddenMean, upit.router_init.Random, upit.router_init.Ridge, ",
        ),
        (
            ["--upcycling.merge", "upit.selection.Even"],
            "valid choices of Merge: upit.merging.Dare, upit.merging.DareTies, upit.merging.Linear, ",
        ),
        (["--upcycling.merge", "upit.merging.Ties", "--upcycling.merge.densty", "0.3"], "densty"),
        (["-c", "wrong.yaml"], "upit.merging.Ties takes: density"),
        (["--seed_everything", "-1"], "error: seed_everything: -1 is not in bounds"),
        (["--upcycling.parents", "Bestt"], "valid choices of Parents: upit.selection.Best, "),
        (["--upcycling.merge.drop_rate", "0.5"], "valid choices of Merge: upit.merging.Dare, "),
        (["--model", "lightning_modules.Nope"], "valid choices of LightningModule: lightning_modules.DenseModule, "),
        (["--data.foo", "1"], "system_prompt, trust_remote_code, max_length, packing, "),
        (
            ["--upcycling.merge", "upit.merging.Dare", "--upcycling.merge.drop_rate", "2"],
            "Dare.drop_rate=2.0 must lie in [0, 1)",
        ),
    ],
)
def test_says_what_would_be_right(arguments, said, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("UPIT_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    (tmp_path / "wrong.yaml").write_text(
        "upcycling: {merge: {class_path: upit.merging.Ties, init_args: {densty: 0.3}}}"
    )
    monkeypatch.setattr(sys, "argv", ["upit", "fit", "-c", str(QUICKSTART), *arguments])
    with pytest.raises(SystemExit, match="2"):
        main()
    text = capsys.readouterr().err
    assert said in text
    assert "Does not validate" not in text
    assert len(text) < 2500, "the usage of every option buries the error"


def test_classes_of_the_user_s_come_last_and_only_those_that_can_be_named(tmp_path, monkeypatch):
    (tmp_path / "a_merge.py").write_text("from upit.merging import Linear\n\n\nclass Own(Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("a_merge").Own

    class Local(own):
        pass

    message = explain("'x.Nope' is not a class: No module <class 'upit.merging.Merge'>")
    assert "valid choices of Merge: upit.merging.Dare, " in message
    assert "upit.merging.Ties, " in message
    assert "a_merge.Own" in message
    assert Local.__name__ not in message
