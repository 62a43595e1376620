"""What a run leaves on disk, read when asked for: one place that knows the files by name."""

import csv
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from upit.core.choice import Strategy
from upit.core.files import (
    LINEAGE_VERSION,
    MAKE_AGAIN,
    SEEDS_VERSION,
    Fields,
    FileError,
    as_nan,
    check_fields,
    read_json,
    read_sealed,
    write_json,
    write_sealed,
)

EVENTS = ("upcycling", "growth")  # each has a folder
LINEAGE_FILE, SEEDS_FILE = "lineage.json", "seed_perplexity.json"


LINEAGE = {"expert": int, "kind": str}
REPORT = {"seed_counts": list, "wall_seconds": dict}
STAGE = {"step": int, "domains": dict}
SEED = {"id": str, "domain": str, "perplexity": list, "expert": int}
PILOT = {"step": int, "epoch": float, "domains": dict}
DISTANCE = {"step": int, "epoch": float, "from_base": float, "from_previous": float}
SWAP: Fields = {"step": int, "kl": (float, type(None)), "before": dict, "after": dict}
ROUTING = {"step": int, "domains": list, "counts_DEC": list, "shuffled_D": list, "tokens": dict}


def write_lineage(file: Path, lineage: Sequence[Mapping[str, Any]]) -> None:
    """Write where each expert comes from; see :mod:`upit.expansion.expand`."""
    write_sealed(file, {"version": LINEAGE_VERSION, "experts": list(lineage)})


def read_lineage(file: Path) -> list[dict[str, Any]]:
    """Read what :func:`write_lineage` wrote.

    Raises: FileError: it is of another version, or damaged.
    """
    lineage: Any = read_sealed(file, LINEAGE_VERSION, MAKE_AGAIN).get("experts")
    check_list(lineage, LINEAGE, file, "experts")
    return lineage


def check_list(entries: Any, fields: Fields, file: Path, where: str) -> None:
    """Check a list of objects, each as :func:`upit.core.files.check_fields`.

    Raises: FileError: names the file, the entry, and the field.
    """
    if not isinstance(entries, list):
        raise FileError(f"{str(file)!r}: {where} is {entries!r:.80}, expected a list")
    for i, entry in enumerate(entries):
        check_fields(entry, fields, file, f"{where}[{i}]")


class Run:
    """The folder of a finished or running fit. What isn't there yet reads as None, or as empty.

    Args:
        directory: a run's folder, ``trainer.default_root_dir``.
    Raises: FileError, on reading a file: it is damaged, or is not what upit writes; the message names it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @property
    def name(self) -> str:
        return self.directory.name

    @cached_property
    def lineages(self) -> list[list[dict[str, Any]]]:
        """Where each expert comes from, see :mod:`upit.expansion.expand`: as upcycled and, where the MoE grew, as
        grown.
        """
        files = [self.directory / event / LINEAGE_FILE for event in EVENTS]
        return [read_lineage(file) for file in files if file.exists()]

    @property
    def lineage(self) -> list[dict[str, Any]] | None:
        """Where each of the experts of now comes from."""
        return self.lineages[-1] if self.lineages else None

    @cached_property
    def similarity(self) -> list[list[float]] | None:
        """How alike the experts of now were when the youngest was made, by the run's own measure."""
        return self._matrix("growth/similarity.json") or self._matrix("upcycling/similarity.json")

    @property
    def measure(self) -> dict[str, Any]:
        """Description of the strategy that measured that similarity."""
        return self.lineage[-1]["measure"] if self.lineage else {"name": "measure not recorded"}

    @cached_property
    def seeds(self) -> dict[str, Any] | None:
        """Seed data: ``examples``, each with domain, perplexity per expert, and its expert."""
        file = self.directory / "upcycling" / SEEDS_FILE
        found = read_sealed(file, SEEDS_VERSION, MAKE_AGAIN) if file.exists() else {}
        if "examples" not in found:
            return None
        check_list(found["examples"], SEED, file, "examples")
        return found

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """Scores of the stages; see :class:`callbacks.RunReport`."""
        report = read_report(self.directory)
        if not report or not report["stages"]:
            return None
        file = self.directory / "report.json"
        check_fields(report, REPORT, file, "the report")
        for name, stage in report["stages"].items():
            check_fields(stage, STAGE, file, f"stages.{name}")
        return report

    @cached_property
    def pilot(self) -> list[dict[str, Any]] | None:
        """Held-out scores of the checkpoints; see :func:`upit.evaluation.pilot.score_checkpoints`."""
        scores = self._list("upcycling/pilot.json", PILOT)
        return as_nan(scores) if scores else None

    @cached_property
    def distances(self) -> list[dict[str, Any]] | None:
        """How far the checkpoints travelled; see :func:`upit.evaluation.pilot.distances`."""
        return self._list("upcycling/distances.json", DISTANCE)

    @cached_property
    def swap(self) -> dict[str, Any] | None:
        """``{"step", "kl", "before": {domain: loss}, "after": {domain: loss}}``."""
        return self._swap("upcycling/swap.json")

    @cached_property
    def growth(self) -> dict[str, Any] | None:
        """As ``swap``, of the later growth of the MoE."""
        return self._swap("growth/swap.json")

    @cached_property
    def routing(self) -> list[dict[str, Any]]:
        """Snapshots of the routing by step: ``{"step", "domains", "counts_DEC", "shuffled_D", "tokens"}``."""
        return [_routing_snapshot(file) for file in sorted((self.directory / "routing").glob("step_*.json"))]

    @cached_property
    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values of each metric in ``metrics.csv``.

        A resumed run left what came before in ``metrics-1.csv`` and so on; it counts up to where the next trains on.
        """
        curves: dict[str, tuple[list[int], list[float]]] = {}
        earlier = sorted(self.directory.glob("metrics-*.csv"), key=lambda file: int(file.stem.rpartition("-")[2]))
        for file in [*earlier, *self.directory.glob("metrics.csv")]:
            try:
                _add_curves(curves, file)
            except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
                raise FileError(f"{str(file)!r} is not a table of metrics by step: {error!r}") from None
        return curves

    @cached_property
    def settings(self) -> dict[str, str | int | float | bool]:
        """The config in one flat table, with the choices left to their defaults where ``callbacks.HParams`` was on."""
        return self._read("settings.json", dict) or self.config

    @property
    def config(self) -> dict[str, str | int | float | bool]:
        """``config.yaml`` in one flat table; see :func:`flatten`."""
        file = self.directory / "config.yaml"
        try:
            return flatten(yaml.safe_load(file.read_text())) if file.exists() else {}
        except (OSError, ValueError, yaml.YAMLError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise FileError(f"{str(file)!r} is not a config that `upit fit` wrote: {error!r}") from None

    def save(self, name: str, value: Any) -> None:
        """Write one of the files above."""
        write_json(self.directory / name, value)

    def save_routing(self, step: int, domains: list[str], routing: dict[str, Tensor], tokens: dict[str, Any]) -> None:
        """Add a snapshot; one of the same step is replaced (a resumed run counts again)."""
        content = {"step": step, "domains": domains, "tokens": tokens}
        self.save(
            f"routing/step_{step:07d}.json", {**content, **{name: value.tolist() for name, value in routing.items()}}
        )

    def forget_routing_after(self, step: int) -> None:
        """Remove the snapshots of later steps: of a future that a resumed run may not have."""
        for file in (self.directory / "routing").glob("step_*.json"):
            if int(file.stem.removeprefix("step_")) > step:
                file.unlink()

    def forget_growth(self) -> None:
        """Remove what says that the MoE grew, but no expert: of a future that a resumed run may not have."""
        for name in ("lineage", "similarity", "swap"):
            (self.directory / "growth" / f"{name}.json").unlink(missing_ok=True)

    def _read(self, file: str, kind: type) -> Any:
        path = self.directory / file
        return read_json(path, kind) if path.exists() else None

    def _list(self, file: str, fields: Fields) -> list[dict[str, Any]] | None:
        found = self._read(file, list)
        if found is not None:
            check_list(found, fields, self.directory / file, "the list")
        return found

    def _matrix(self, file: str) -> list[list[float]] | None:
        found = self._read(file, list)
        found = found and as_nan(found)
        if found is not None and _tensor(found, self.directory / file, "the matrix").shape != (len(found),) * 2:
            raise FileError(f"{str(self.directory / file)!r} does not hold a square matrix of numbers")
        return found

    def _swap(self, file: str) -> dict[str, Any] | None:
        found = self._read(file, dict)
        if found is None:
            return None
        found = as_nan(found)
        check_fields(found, SWAP, self.directory / file, "the object")
        return found


def read_report(run: Path) -> dict[str, Any] | None:
    """The scores of a run's stages, NaN where one was not finite; None where there is no report.json yet.

    Raises: FileError: it is damaged.
    """
    file = run / "report.json"
    if not file.exists():
        return None
    report = read_json(file, dict)
    check_fields(report, {"stages": dict}, file, "the report")
    report["stages"] = as_nan(report["stages"])
    for name, stage in report["stages"].items():
        check_fields(stage, {"average": dict}, file, f"stages.{name}")
    return report


def _routing_snapshot(file: Path) -> dict[str, Any]:
    snapshot = read_json(file, dict)
    check_fields(snapshot, ROUTING, file, "the snapshot")
    for name in ("counts_DEC", "shuffled_D"):
        snapshot[name] = _tensor(snapshot[name], file, name)
    if snapshot["counts_DEC"].ndim != 3 or snapshot["shuffled_D"].ndim != 1:
        raise FileError(f"{str(file)!r}: counts_DEC or shuffled_D has the wrong number of dimensions")
    return snapshot


def _tensor(values: list, file: Path, where: str) -> Tensor:
    try:
        return torch.tensor(values)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise FileError(f"{str(file)!r}: {where} is not an array of numbers: {error}") from None


def _add_curves(curves: dict[str, tuple[list[int], list[float]]], file: Path) -> None:
    """Append what a metrics.csv holds; it replaces what earlier files say from its first training step on."""
    with file.open() as stream:
        rows = list(csv.DictReader(stream))
    _cut(curves, before=next((int(row["step"]) for row in rows if row.get("train/loss")), sys.maxsize))
    for row in rows:
        for name in row.keys() - {"step", "epoch"}:
            if row[name]:
                steps, values = curves.setdefault(name, ([], []))
                steps.append(int(row["step"]))
                values.append(float(row[name]))


def _cut(curves: dict[str, tuple[list[int], list[float]]], *, before: int) -> None:
    for name, (steps, values) in curves.items():
        kept = [(step, value) for step, value in zip(steps, values, strict=True) if step < before]
        curves[name] = ([step for step, _ in kept], [value for _, value in kept])


def choices(key: str, owner: object) -> dict[str, Any]:
    """The strategies that an object holds, in a flat table under ``key``: its defaults are here by name as well."""
    flat: dict[str, Any] = {}
    for name, value in vars(owner).items():
        if isinstance(value, Strategy):
            about = value.describe()
            flat[f"{key}.{name}"] = about.pop("name")
            for argument, setting in about.items():
                _flatten_into(flat, f"{key}.{name}.{argument}", setting)
    return flat


TRAINER_SETTINGS = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "devices")


def flatten(config: dict[str, Any]) -> dict[str, str | int | float | bool]:
    """A CLI config as a flat table: ``{"model.moe.lr": 0.002, "upcycling": "Upcycling", ...}``.

    A class's value is its name, its arguments follow beneath it; plain nested values become text. Of the trainer only
    what bears on results is kept, and its callbacks but for Lightning's own.
    """
    sections = {key: value for key, value in config.items() if key not in ("trainer", "ckpt_path", "weights_only")}
    trainer = config.get("trainer") or {}
    sections["trainer"] = {key: trainer.get(key) for key in TRAINER_SETTINGS}
    for callback in trainer.get("callbacks") or []:
        if not callback["class_path"].startswith("lightning."):
            sections[callback["class_path"].rpartition(".")[2].lower()] = callback
    flat: dict[str, Any] = {}
    for key, value in sections.items():
        _flatten_into(flat, key, value, is_section=True)
    return flat


def _flatten_into(flat: dict[str, Any], key: str, value: Any, *, is_section: bool = False) -> None:
    if isinstance(value, dict) and "class_path" in value:
        flat[key] = value["class_path"].rpartition(".")[2]
        for name, argument in (value.get("init_args") or {}).items():
            _flatten_into(flat, f"{key}.{name}", argument)
    elif isinstance(value, dict) and is_section:
        for name, argument in value.items():
            _flatten_into(flat, f"{key}.{name}", argument)
    else:
        flat[key] = value if isinstance(value, str | int | float | bool) else str(value)
