"""Small files: readers see the old content or the new, never half."""

import os

import pytest

from upit.files import Estimate, read_json, write_json


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
