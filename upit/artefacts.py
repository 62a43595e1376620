"""What a run leaves on disk, read when asked for: one place that knows the files by name."""

import csv
import sys
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from upit.files import read_json, write_json
from upit.strategy import Strategy

EVENTS = ("upcycling", "growth")  # each has a folder
MEASURE = "upcycling.similarity"  # in the settings


class Run:
    """The folder of a finished or running fit. What isn't there yet reads as None, or as empty.

    Args:
        directory: a run's folder, ``trainer.default_root_dir``.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)

    @property
    def name(self) -> str:
        return self.directory.name

    @cached_property
    def lineages(self) -> list[list[dict[str, Any]]]:
        """Where each expert comes from, see :mod:`upit.expansion`: as upcycled and, where the MoE grew, as grown."""
        return [found for event in EVENTS if (found := self._read(f"{event}/lineage.json"))]

    @property
    def lineage(self) -> list[dict[str, Any]] | None:
        """Where each of the experts of now comes from."""
        return self.lineages[-1] if self.lineages else None

    @cached_property
    def similarity(self) -> list[list[float]] | None:
        """How alike the experts of now were when the youngest was made, by the run's own measure."""
        return self._read("growth/similarity.json") or self._read("upcycling/similarity.json")

    @property
    def measure(self) -> dict[str, Any]:
        """What that similarity is: a strategy's description. Runs of before lineages named it have it in settings."""
        if self.lineage and "measure" in self.lineage[-1]:
            return self.lineage[-1]["measure"]
        name, arguments = self.settings.get(MEASURE), f"{MEASURE}."
        about = {key.removeprefix(arguments): self.settings[key] for key in self.settings if key.startswith(arguments)}
        return {"name": "measure not recorded" if name in (None, "None") else name, **about}

    @cached_property
    def seeds(self) -> dict[str, Any] | None:
        """Seed data: ``examples``, each with domain, perplexity per expert, and its expert."""
        found = self._read("upcycling/seed_perplexity.json")
        return found if found and "examples" in found else None

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """Scores of the stages; see :class:`callbacks.RunReport`."""
        found = self._read("report.json")
        return found if found and found["stages"] else None

    @cached_property
    def pilot(self) -> list[dict[str, Any]] | None:
        """Held-out scores of the checkpoints; see :func:`upit.pilot.score_checkpoints`."""
        return self._read("upcycling/pilot.json")

    @cached_property
    def distances(self) -> list[dict[str, Any]] | None:
        """How far the checkpoints travelled; see :func:`upit.pilot.distances`."""
        return self._read("upcycling/distances.json")

    @cached_property
    def swap(self) -> dict[str, Any] | None:
        """``{"step", "kl", "before": {domain: loss}, "after": {domain: loss}}``."""
        return self._read("upcycling/swap.json")

    @cached_property
    def growth(self) -> dict[str, Any] | None:
        """As ``swap``, of the later growth of the MoE."""
        return self._read("growth/swap.json")

    @cached_property
    def routing(self) -> list[dict[str, Any]]:
        """Snapshots of the routing by step: ``{"step", "domains", "counts_DEC", "shuffled_D", "tokens"}``."""
        snapshots = [read_json(file) for file in sorted((self.directory / "routing").glob("step_*.json"))]
        for snapshot in snapshots:
            snapshot["counts_DEC"] = torch.tensor(snapshot["counts_DEC"])
            snapshot["shuffled_D"] = torch.tensor(snapshot["shuffled_D"])
        return snapshots

    @cached_property
    def curves(self) -> dict[str, tuple[list[int], list[float]]]:
        """Steps and values of each metric in ``metrics.csv``.

        A resumed run left what came before in ``metrics-1.csv`` and so on; it counts up to where the next trains on.
        """
        curves: dict[str, tuple[list[int], list[float]]] = {}
        earlier = sorted(self.directory.glob("metrics-*.csv"), key=lambda file: int(file.stem.rpartition("-")[2]))
        for file in [*earlier, *self.directory.glob("metrics.csv")]:
            with file.open() as stream:
                rows = list(csv.DictReader(stream))
            _cut(curves, before=next((int(row["step"]) for row in rows if row.get("train/loss")), sys.maxsize))
            for row in rows:
                for name in row.keys() - {"step", "epoch"}:
                    if row[name]:
                        steps, values = curves.setdefault(name, ([], []))
                        steps.append(int(row["step"]))
                        values.append(float(row[name]))
        return curves

    @cached_property
    def settings(self) -> dict[str, str | int | float | bool]:
        """The config in one flat table, with the choices left to their defaults where ``callbacks.HParams`` was on."""
        return self._read("settings.json") or self.config

    @property
    def config(self) -> dict[str, str | int | float | bool]:
        """``config.yaml`` in one flat table; see :func:`flatten`."""
        file = self.directory / "config.yaml"
        return flatten(yaml.safe_load(file.read_text())) if file.exists() else {}

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

    def _read(self, file: str) -> Any:
        path = self.directory / file
        return read_json(path) if path.exists() else None


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
