"""Tables as a heading and rows of text, for TensorBoard's Markdown and the HTML page."""

from collections.abc import Mapping, Sequence
from typing import Any

Table = tuple[list[str], list[list[str]]]


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; bars inside of cells are kept from splitting them."""
    lines = [list(head), ["---"] * len(head), *[list(row) for row in rows]]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def score_table(report: Mapping[str, Any]) -> Table:
    """Loss and exact match by domain and stage, of a run's ``report.json``."""
    stages = report["stages"]
    domains = list(next(iter(stages.values()))["domains"])
    rows = [[name, *[_score(scores["domains"][name]) for scores in stages.values()]] for name in domains]
    rows.append(["average", *[_score(scores["average"]) for scores in stages.values()]])
    return ["loss (nats), exact match", *stages], rows


def settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    """Settings by run, of :attr:`upit.report.run.Run.settings`."""
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    return ["setting", *settings], [[name, *[str(v.get(name, "")) for v in settings.values()]] for name in names]


def _score(scores: Mapping[str, float]) -> str:
    return f"{scores['loss']:.3f}, {scores['exact_match']:.1%}"
