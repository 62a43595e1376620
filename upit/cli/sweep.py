"""Run a list of configs over several random seeds, each in a process of its own, and compare them.

A seed is the run's ``seed_everything``: weights from scratch, the order of the data, and all that upcycling draws. The
data itself stays the same over the seeds, as ``data.seed`` makes it.

A run counts as finished once ``callbacks.RunReport`` says so in its ``report.json``: every config needs that callback.

<output>/<config>/seed_<n>/   a run like any other
<output>/summary.json         mean and standard deviation of each config
<output>/hparams/<config>/    the same for TensorBoard's HParams
"""

import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from upit.cli.run_directory import RUN_DIR, InUseError, check_free
from upit.core.files import write_json
from upit.report.run import read_report

METRICS = ("loss", "exact_match")


class Cell(NamedTuple):
    """One run of a sweep."""

    config: str  # its name
    arguments: tuple[str, ...]  # of upit fit: the base configs, what changes them, and its own config
    seed: int
    run: Path


def plan(
    base: Sequence[Path], configs: Sequence[Path], seeds: Sequence[int], output: Path, *, extra: Sequence[str] = ()
) -> list[Cell]:
    """Every run of a sweep: the base by itself, then each config stacked on it, over all seeds.

    Args:
        extra: more arguments of ``upit fit``; they change the base, and a config has the last word.
    Raises: ValueError: a config file is missing, two share a name, or a seed is negative or given twice.
    """
    for path in (*base, *configs):
        if not path.is_file():
            raise ValueError(f"config {str(path)!r} does not exist")
    common = (*_options(base), *extra)
    stacks = {base[-1].stem: common}
    for path in configs:
        if path.stem in stacks:
            raise ValueError(f"two configs are named {path.stem!r}; a run's directory has its config's name")
        stacks[path.stem] = (*common, *_options([path]))
    if min(seeds) < 0:
        raise ValueError(f"seeds={list(seeds)} must not be negative")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)} holds one twice")
    return [
        Cell(name, arguments, seed, output / name / f"seed_{seed}")
        for name, arguments in stacks.items()
        for seed in seeds
    ]


def _options(configs: Sequence[Path]) -> list[str]:
    return [argument for path in configs for argument in ("-c", str(path))]


def final_scores(run: Path) -> dict[str, float] | None:
    """Average scores at the end of a run; None before it is finished."""
    report = read_report(run) or {}
    return list(report["stages"].values())[-1]["average"] if report.get("finished") else None


def last_checkpoint(run: Path) -> Path | None:
    """The checkpoint that was written last."""
    found = [path for path in (run / "checkpoints").glob("*") if path.suffix == ".ckpt"]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def fit(cell: Cell, log: Path | None = None) -> bool:
    """Run a cell from its last checkpoint, or anew: what an interrupted run left before its first one is removed.

    Args:
        log: file that takes what the run prints; default the terminal.
    Returns: whether it finished; False where another fit is running in its directory.
    """
    try:
        check_free(cell.run)
    except InUseError as error:
        print(error, file=sys.stderr)
        return False
    command = [sys.executable, "-m", "upit", "fit", *cell.arguments]
    command += ["--seed_everything", str(cell.seed), "--trainer.default_root_dir", str(cell.run)]
    checkpoint = last_checkpoint(cell.run)
    if checkpoint is not None:
        command += ["--ckpt_path", str(checkpoint)]
    elif cell.run.exists():
        shutil.rmtree(cell.run)
    environment = {name: value for name, value in os.environ.items() if name != RUN_DIR}  # each has its own
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if log is None else log.open("w") as stream:
        subprocess.run(command, env=environment, stdout=stream, stderr=stream, check=False)
    return final_scores(cell.run) is not None


def sweep(
    cells: Sequence[Cell],
    output: Path,
    *,
    jobs: int = 1,
    console: Console | None = None,
    run: Callable[[Cell, Path | None], bool] = fit,
) -> list[Cell]:
    """Run all cells that are not finished; write the comparison after each, and print it at the end.

    Args:
        jobs: runs at a time; where there are several, each prints to a ``.log`` beside its directory.
    Returns: the cells that failed; the others go on without them.
    """
    console = console or Console()

    def work(cell: Cell) -> bool:
        finished = final_scores(cell.run) is not None
        state = "finished before" if finished else "resumed" if last_checkpoint(cell.run) else "started"
        console.rule(f"{cells.index(cell) + 1}/{len(cells)}  {cell.config}, seed {cell.seed}: {state}")
        console.file.flush()  # the run writes to the same terminal
        return finished or run(cell, cell.run.with_suffix(".log") if jobs > 1 else None)

    failed = []
    with ThreadPoolExecutor(jobs) as pool:
        for cell, done in zip(cells, pool.map(work, cells), strict=True):
            failed += [] if done else [cell]
            summary = summarise(cells)
            write_json(output / "summary.json", summary)
    write_hparams(summary, output / "hparams")
    print_summary(summary, console)
    for cell in failed:
        console.print(f"[bold]{cell.config}, seed {cell.seed}, failed;[/bold] the same command tries it again")
    return failed


def summarise(cells: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """Mean and sample standard deviation of the final scores by config, over its finished runs.

    Returns: ``{config: {"runs": n, metric: {"mean", "std"}}}``; no std of a single run.
    """
    summary: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(cell.config for cell in cells):
        scores = [found for cell in cells if cell.config == name and (found := final_scores(cell.run))]
        summary[name] = {"runs": len(scores)}
        for metric in METRICS if scores else ():
            values = [score[metric] for score in scores]
            std = statistics.stdev(values) if len(values) > 1 else None
            summary[name][metric] = {"mean": statistics.fmean(values), "std": std}
    return summary


def print_summary(summary: Mapping[str, Mapping[str, Any]], console: Console) -> None:
    table = Table(title="Held-out scores at the end, mean ± standard deviation")
    for column in ("config", "runs", "loss (nats)", "exact match"):
        table.add_column(column, justify="left" if column == "config" else "right")
    for name, entry in summary.items():
        loss, match = (entry.get(metric) for metric in METRICS)
        table.add_row(name, str(entry["runs"]), _cell(loss, "{:.3f}"), _cell(match, "{:.1%}"))
    console.print(table)


def _cell(value: Mapping[str, float | None] | None, form: str) -> str:
    if value is None:
        return "-"
    std = value["std"]
    return form.format(value["mean"]) + ("" if std is None else f" ± {form.format(std)}")


def write_hparams(summary: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """One row of TensorBoard's HParams a config."""
    from torch.utils.tensorboard import SummaryWriter

    shutil.rmtree(directory, ignore_errors=True)
    for name, entry in summary.items():
        scores = {
            f"sweep/{metric}_{kind}": value
            for metric in METRICS
            for kind, value in entry.get(metric, {}).items()
            if value is not None
        }
        with SummaryWriter(str(directory / name)) as writer:
            writer.add_hparams({"config": name, "runs": entry["runs"]}, scores, run_name=".")
