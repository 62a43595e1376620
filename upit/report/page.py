"""One HTML page about one run or several side by side: no script, no network, every picture inside."""

import base64
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from upit.evaluation.metrics import summary
from upit.evaluation.pilot import specialist_gain
from upit.report.figures.base import png
from upit.report.figures.curves import compared_losses, compared_scores
from upit.report.pictures import PICTURES, draw
from upit.report.run import Run
from upit.report.tables import Table, score_table, settings_table

Track = Callable[[Iterable], Iterable]

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; background: #fff; margin: 0 auto; padding: 1.5rem;
  max-width: 1700px; }
h1 { margin: 0; } h2 { margin: 2.5rem 0 .3rem; border-top: 1px solid #d8dee4; padding-top: 1.2rem; }
h3 { margin: 1rem 0 .3rem; } p { max-width: 75ch; color: #424a53; margin: .3rem 0 .8rem; }
nav { margin: .8rem 0; line-height: 2; } nav a { margin-right: 1rem; white-space: nowrap; }
a { color: #0b62ad; text-decoration: none; } a:hover { text-decoration: underline; }
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 560px), 1fr)); gap: 1.2rem; }
.table { overflow-x: auto; }
figure { margin: 0; } figcaption { font-weight: 600; margin-bottom: .2rem; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { border: 1px solid #d8dee4; padding: .25rem .6rem; text-align: right; white-space: nowrap; }
th { background: #f3f5f7; } td:first-child, th:first-child { text-align: left; }
.settings td { text-align: left; max-width: 40ch; overflow-wrap: anywhere; white-space: normal; }
summary { cursor: pointer; color: #0b62ad; } .missing { color: #6e7781; font-style: italic; }
"""


def write_page(directories: Sequence[str | Path], output: str | Path, *, track: Track = lambda tags: tags) -> Path:
    """Write a self-contained HTML page about runs.

    Args:
        directories: runs' folders.
        output: file to write; an older one is replaced.
        track: wraps the pictures, for a progress bar.
    Raises: FileNotFoundError: a folder is missing, or holds nothing of a run.
    """
    runs = [Run(directory) for directory in directories]
    for run in runs:
        if not (run.curves or run.report or run.lineage):
            raise FileNotFoundError(
                f"RUN={str(run.directory)!r} holds no metrics.csv, report.json or upcycling/lineage.json: "
                "name the folder that `upit fit` wrote (trainer.default_root_dir)"
            )
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(runs, track=track), encoding="utf-8")
    return output


def page(runs: Sequence[Run], *, track: Track = lambda tags: tags) -> str:
    """The page as text; see :func:`write_page`."""
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.directory) for run in runs]
    named = dict(zip(names, runs, strict=True))
    sections = [
        ("summary", "Summary", _table(_summary_table(named))),
        ("scores", "Scores", _scores(named)),
        ("settings", "Settings", _settings(named)),
    ]
    for tag in track(PICTURES):
        picture = PICTURES[tag]
        sections.append((tag, picture.title, f"<p>{escape(picture.caption)}</p>{_side_by_side(named, tag)}"))
    links = "".join(f'<a href="#{key}">{escape(title)}</a>' for key, title, _ in sections)
    body = "".join(f'<h2 id="{key}">{escape(title)}</h2>{content}' for key, title, content in sections)
    heading = escape(", ".join(names))
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>upit: {heading}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head><body><h1>{heading}</h1>"
        f"<p>Upcycling instruction tuning from dense to Mixture-of-Experts.</p>"
        f"<nav>{links}</nav>{body}</body></html>\n"
    )


def _summary_table(runs: dict[str, Run]) -> Table:
    columns = [_numbers(run) for run in runs.values()]
    keys = dict.fromkeys(key for column in columns for key in column)
    rows = [[key, *[column.get(key, "–") for column in columns]] for key in keys]
    return ["", *runs], rows


def _numbers(run: Run) -> dict[str, str]:
    """The run in a few numbers, as text; a dash where it has none."""
    report = run.report or {"stages": {}, "num_experts": None, "top_k": None, "wall_seconds": {}}
    routing = run.routing[-1] if run.routing else None
    facts = summary(routing["counts_DEC"], routing["shuffled_D"]) if routing else {}

    def average(stage: str) -> str:
        scores = report["stages"].get(stage)
        return f"{scores['average']['loss']:.3f} nats, {scores['average']['exact_match']:.1%}" if scores else "–"

    def fact(name: str, form: str) -> str:
        return format(facts[name], form) if facts else "–"

    growth = {"held out, before the MoE grew": average("moe"), "held out, right after": average("growth")}
    growth = growth if "growth" in report["stages"] else {}
    return {
        "experts": f"{report['num_experts']}, top-{report['top_k']}" if report["num_experts"] else "–",
        "held out, before training": average("base"),
        "held out, dense before the swap": average("dense"),
        "held out, right after the swap": average("swap"),
        **growth,
        "held out, final MoE": average("final"),
        "specialist gain of the checkpoints": f"{specialist_gain(run.pilot, 'loss'):.4f} nats" if run.pilot else "–",
        "KL of the logits at the swap": f"{run.swap['kl']:.2e} nats" if run.swap else "–",
        "mutual information of expert and domain": fact("mutual_information", ".4f") + " bits",
        "the same, domains shuffled": fact("mutual_information_shuffled", ".4f") + " bits",
        "entropy of the load (1 = even)": fact("load_entropy", ".3f"),
        "dead experts (over all layers)": fact("dead_experts", ".0f"),
        "wall time": f"{sum(report['wall_seconds'].values()):.0f} s" if report["wall_seconds"] else "–",
    }  # fmt: skip


def _scores(runs: dict[str, Run]) -> str:
    content = []
    if len(runs) > 1:
        last = {name: list(run.report["stages"].values())[-1] for name, run in runs.items() if run.report}
        figures = [compared_losses({name: run.curves for name, run in runs.items()})]
        figures += [compared_scores(last)] if last else []
        titles = ("Held-out loss of all runs", "Exact match of the last stage")
        parts = [_image(figure, title, alt=title) for figure, title in zip(figures, titles, strict=False)]
        content.append(f'<div class="runs">{"".join(parts)}</div>')
    tables = [
        f"<div><h3>{escape(name)}</h3>{_table(score_table(run.report))}</div>"
        for name, run in runs.items()
        if run.report
    ]
    return "".join([*content, f'<div class="runs">{"".join(tables)}</div>'])


def _settings(runs: dict[str, Run]) -> str:
    """The settings that differ, and all of them folded away."""
    head, rows = settings_table({name: run.settings for name, run in runs.items()})
    differing = [row for row in rows if len(set(row[1:])) > 1]
    shown = f"<p>What differs:</p>{_table((head, differing), 'settings')}" if differing else ""
    return f"{shown}<details><summary>All settings</summary>{_table((head, rows), 'settings')}</details>"


def _side_by_side(runs: dict[str, Run], tag: str) -> str:
    parts = []
    for name, run in runs.items():
        figure = draw(tag, run)
        parts.append(_image(figure, name if len(runs) > 1 else "", alt=f"{PICTURES[tag].title}, {name}"))
    return f'<div class="runs">{"".join(parts)}</div>'


def _image(figure: Figure | None, title: str, alt: str) -> str:
    caption = f"<figcaption>{escape(title)}</figcaption>" if title else ""
    content = '<span class="missing">not in this run</span>'
    if figure is not None:
        data = base64.b64encode(png(figure)).decode()
        content = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure>{caption}{content}</figure>"


def _table(table: Table, kind: str = "") -> str:
    head, rows = table
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="table"><table class="{kind}"><tr>{top}</tr>{body}</table></div>'
