"""What a run's folder reads as, half written or resumed."""

import torch

from upit.artefacts import Run, choices
from upit.merging import Dare


def test_an_empty_folder_reads_as_nothing(tmp_path):
    run = Run(tmp_path)
    assert (run.lineage, run.similarity, run.seeds, run.report, run.pilot, run.swap) == (None,) * 6
    assert (run.routing, run.curves, run.settings) == ([], {}, {})


def test_seed_data_half_scored_is_none_yet(tmp_path):
    Run(tmp_path).save("upcycling/seed_perplexity.json", {"columns": {"sha": [1.0]}})
    assert Run(tmp_path).seeds is None


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
