"""Small files: readers see the old content or the new, never half."""

import json
import math
import os

import pytest

from upit.core.files import Estimate, as_nan, read_json, write_json


def test_round_trip_makes_the_folder(tmp_path):
    file = tmp_path / "new/folder/value.json"
    write_json(file, {"a": [1, 2.5, None], "ü": "é"})
    assert read_json(file) == {"a": [1, 2.5, None], "ü": "é"}
    assert os.listdir(file.parent) == ["value.json"]


def test_a_value_that_cannot_be_written_leaves_the_old_one(tmp_path):
    file = tmp_path / "value.json"
    write_json(file, {"old": 1})
    with pytest.raises(TypeError):
        write_json(file, {"new": object()})
    assert read_json(file) == {"old": 1}


def test_killed_before_the_rename_leaves_the_old_one(tmp_path, monkeypatch):
    file = tmp_path / "value.json"
    write_json(file, {"old": 1})

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(file, {"new": 2})
    assert read_json(file) == {"old": 1}


def test_work_after_work_keeps_files_and_frees_memory():
    assert Estimate(5, 1).then(Estimate(3, 4)) == Estimate(5, 5)


def test_json_never_holds_nan(tmp_path):
    file = tmp_path / "value.json"
    scores = {"loss": float("nan"), "domains": [{"loss": -float("inf")}, {"loss": 1.5}], "pair": (float("inf"), 2)}
    write_json(file, scores)

    def refuse(constant):
        raise AssertionError(constant)

    found = json.loads(file.read_text(), parse_constant=refuse)
    assert found == {"loss": None, "domains": [{"loss": None}, {"loss": 1.5}], "pair": [None, 2]}
    read = as_nan(found)
    assert math.isnan(read["loss"])
    assert math.isnan(read["domains"][0]["loss"])
    assert read["domains"][1] == {"loss": 1.5}
