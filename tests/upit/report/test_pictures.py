"""Pictures from a run's files."""

from upit.report.pictures import draw
from upit.report.run import Run, write_lineage


def test_similarity_names_its_measure_where_nothing_was_merged(tmp_path):
    run, about = Run(tmp_path), {"measure": {"name": "Cosine", "against": "base"}}
    run.save("upcycling/similarity.json", [[1.0, 0.5], [0.5, 1.0]])
    lineage = [{"expert": i, "kind": "harvested", "step": i + 1, "epoch": 0.5, **about} for i in range(2)]
    write_lineage(tmp_path / "upcycling/lineage.json", lineage)
    figure = draw("experts/similarity", run)
    assert "similarity: Cosine (against base)" in [axes.get_ylabel() for axes in figure.axes]
