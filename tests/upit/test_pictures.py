"""Pictures from a run's files."""

import pytest

from upit.artefacts import Run
from upit.pictures import draw

MEASURED = {"measure": {"name": "Cosine", "against": "base"}}
SETTINGS = {"upcycling.similarity": "Euclidean", "upcycling.similarity.against": "raw"}


@pytest.mark.parametrize(
    ("about", "settings", "label"),
    [
        (MEASURED, SETTINGS, "similarity: Cosine (against base)"),
        ({}, SETTINGS, "similarity: Euclidean (against raw)"),  # of an older run
        ({}, {"upcycling.similarity": "None"}, "similarity: measure not recorded"),  # of one without HParams
        ({}, {}, "similarity: measure not recorded"),
    ],
)
def test_similarity_names_its_measure_where_nothing_was_merged(tmp_path, about, settings, label):
    run = Run(tmp_path)
    run.save("settings.json", settings)
    run.save("upcycling/similarity.json", [[1.0, 0.5], [0.5, 1.0]])
    lineage = [{"expert": i, "kind": "harvested", "step": i + 1, "epoch": 0.5, **about} for i in range(2)]
    run.save("upcycling/lineage.json", lineage)
    figure = draw("experts/similarity", run)
    assert label in [axes.get_ylabel() for axes in figure.axes]
