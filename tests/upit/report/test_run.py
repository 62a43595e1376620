"""What a run's folder reads as, half written or resumed."""

import json
import random

import pytest
import torch

from upit.core.files import FileError, digest, write_sealed
from upit.expansion.merging import Dare
from upit.report.run import Run, choices


def test_an_empty_folder_reads_as_nothing(tmp_path):
    run = Run(tmp_path)
    assert (run.lineage, run.similarity, run.seeds, run.report, run.pilot, run.swap) == (None,) * 6
    assert (run.routing, run.curves, run.settings) == ([], {}, {})


def test_seed_data_half_scored_is_none_yet(tmp_path):
    write_sealed(tmp_path / "upcycling/seed_perplexity.json", {"version": 1, "columns": {"sha": [1.0]}})
    assert Run(tmp_path).seeds is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"expert": 0}]', "has no format version, this version of upit reads 1: make it again"),
        ('{"version": 2, "experts": []}', "has format version 2, this version of upit reads 1: make it again"),
        ('{"version": 1, "experts": [], "sha256": "0"}', "is damaged"),
        ('{"version": 1, "expe', "can't be read as JSON"),
    ],
    ids=["older", "newer", "changed", "truncated"],
)
@pytest.mark.parametrize(
    ("name", "what"), [("lineage.json", "lineage"), ("seed_perplexity.json", "seeds")], ids=["lineage", "seeds"]
)
def test_another_format_and_damage_are_refused_and_named(tmp_path, content, message, name, what):
    (tmp_path / "upcycling").mkdir()
    (tmp_path / "upcycling" / name).write_text(content)
    with pytest.raises(FileError, match=rf"{name}' {message}"):
        getattr(Run(tmp_path), what)


def test_curves_of_a_resumed_run_are_joined_where_it_went_on(tmp_path):
    (tmp_path / "metrics-1.csv").write_text("epoch,step,train/loss,val/loss\n0,1,5,\n0,2,4,3\n0,3,99,\n")
    (tmp_path / "metrics-2.csv").write_text("epoch,step,train/loss\n0,3,3\n0,4,99\n")
    (tmp_path / "metrics.csv").write_text("epoch,step,train/loss,val/loss\n,0,,9\n0,4,2,\n0,5,1,1\n")
    curves = Run(tmp_path).curves
    assert curves["train/loss"] == ([1, 2, 3, 4, 5], [5.0, 4.0, 3.0, 2.0, 1.0])
    assert curves["val/loss"] == ([2, 0, 5], [3.0, 9.0, 1.0]), "a value logged for an earlier step cuts nothing"


def test_a_snapshot_of_the_same_step_is_replaced(tmp_path):
    for expert in range(2):
        counts = torch.zeros(1, 2, 1, dtype=torch.int64)
        counts[0, expert] = 7
        Run(tmp_path).save_routing(4, ["a"], {"counts_DEC": counts, "shuffled_D": torch.zeros(1)}, {})
    (snapshot,) = Run(tmp_path).routing
    assert snapshot["step"] == 4
    assert snapshot["counts_DEC"].flatten().tolist() == [0, 7]


def test_choices_name_a_strategy_and_its_arguments():
    class Owner:
        def __init__(self):
            self.merge = Dare(0.3)
            self.seed = 1

    assert choices("upcycling", Owner()) == {
        "upcycling.merge": "Dare",
        "upcycling.merge.drop_rate": 0.3,
    }


def sealed(content):
    return {**content, "sha256": digest(content)}


STAGE = {"step": 4, "average": {"loss": 1.0, "exact_match": 0.5}, "domains": {"a": {"loss": 1.0, "exact_match": 0.5}}}
SWAP = {"step": 4, "kl": 0.1, "before": {"a": 1.0}, "after": {"a": 1.1}}
FILES = {  # what a run leaves behind, and the property that reads it
    "report.json": ({"stages": {"base": STAGE}, "seed_counts": [1], "wall_seconds": {}}, "report"),
    "upcycling/lineage.json": (
        sealed({"version": 1, "experts": [{"expert": 0, "kind": "harvested", "step": 1, "epoch": 0.5}]}),
        "lineage",
    ),
    "upcycling/similarity.json": ([[1.0, 0.5], [0.5, 1.0]], "similarity"),
    "upcycling/seed_perplexity.json": (
        sealed({"version": 1, "examples": [{"id": "x", "domain": "a", "perplexity": [1.0], "expert": 0}]}),
        "seeds",
    ),
    "upcycling/pilot.json": ([{"step": 1, "epoch": 0.5, "domains": {"a": {"loss": 1.0}}}], "pilot"),
    "upcycling/distances.json": ([{"step": 1, "epoch": 1, "from_base": 0.1, "from_previous": 0.1}], "distances"),
    "upcycling/swap.json": (SWAP, "swap"),
    "growth/swap.json": (SWAP, "growth"),
    "routing/step_0000004.json": (
        {"step": 4, "domains": ["a"], "counts_DEC": [[[1], [2]]], "shuffled_D": [0.0], "tokens": {}},
        "routing",
    ),
    "settings.json": ({"a": 1}, "settings"),
}


@pytest.mark.parametrize("file", FILES)
def test_damaged_files_are_named(tmp_path, file):
    """Truncated, of another type, or with a byte changed: read in the right form, or the project's own error."""
    value, name = FILES[file]
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value)
    path.write_text(text)
    assert getattr(Run(tmp_path), name)
    wrong_type = "7" if isinstance(value, dict) else '{"a": [1]}'
    for broken in ("", text[:-1], wrong_type, "[" * 100_000, "\udcff"):
        path.write_bytes(broken.encode(errors="surrogateescape"))
        with pytest.raises(FileError, match=path.name):
            getattr(Run(tmp_path), name)
    draw = random.Random(0)
    for _ in range(200):
        damaged = bytearray(text.encode())
        damaged[draw.randrange(len(damaged))] = draw.randrange(32, 127)
        path.write_bytes(damaged)
        try:
            getattr(Run(tmp_path), name)
        except FileError as error:
            assert path.name in str(error)  # noqa: PT017


@pytest.mark.parametrize(
    ("file", "content", "reader"),
    [
        ("metrics.csv", "epoch,step,train/loss\n0,one,5\n", "curves"),
        ("metrics.csv", "epoch,step,train/loss\n0,1,much\n", "curves"),
        ("metrics.csv", "epoch,train/loss\n0,1\n", "curves"),
        ("config.yaml", "a: [1", "config"),
        ("config.yaml", "- 7", "config"),
    ],
)
def test_a_damaged_table_or_config_is_named(tmp_path, file, content, reader):
    (tmp_path / file).write_text(content)
    with pytest.raises(FileError, match=file):
        getattr(Run(tmp_path), reader)
