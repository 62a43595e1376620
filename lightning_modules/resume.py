"""Resuming under other settings: what a checkpoint records, which changes a resumed run takes, which it refuses.

A record is a flat table of plain values, ``{"model.dense.lr": 2e-5, "data.batch_size": 8, ...}``, so that a checkpoint
loads with ``weights_only=True``. :data:`RULES` says what a changed value means.
"""

from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from upit.core.choice import Strategy, parameters_of
from upit.core.run_seed import run_seed

Record = dict[str, Any]

TRAINER = (
    "max_epochs", "max_steps", "accumulate_grad_batches", "precision", "world_size", "gradient_clip_val",
    "gradient_clip_algorithm", "val_check_interval", "check_val_every_n_epoch", "log_every_n_steps",
    "limit_train_batches", "limit_val_batches", "overfit_batches", "fast_dev_run",
)  # fmt: skip
STORED_AS = {"model": "source", "tokenizer": "tokenizer_source", "compile": "compile_layers"}  # argument -> attribute
DERIVED = ("keep_rest",)  # attributes that other callbacks set, before the fit
PRESENT, ABSENT = "present", "absent"  # of a callback


# --- what is recorded ---------------------------------------------------------------------------------


def record(module: Any, trainer: L.Trainer) -> Record:
    """Every setting that bears on a fit's results; taken in ``setup``, after that of the callbacks."""
    data, parts = trainer.datamodule, module.phases
    sections: dict[str, Any] = {
        "seed_everything": run_seed(),
        "trainer": {name: getattr(trainer, name, None) for name in TRAINER},
        "data": {**settings_of(data), **data.identity()},
    }
    for part in parts:
        sections["model" if part is module else f"model.{part.phase}"] = settings_of(part)
    for callback in trainer.callbacks:
        if not type(callback).__module__.startswith(("lightning.", "upit.cli")):  # they keep what they need themselves
            name = type(callback).__name__
            sections[name] = PRESENT
            sections |= {f"{name}.{field}": value for field, value in settings_of(callback).items()}
    return dict(_flat("", sections))


def settings_of(owner: object) -> dict[str, Any]:
    """Arguments of an object's constructor, as far as it keeps them under their names, and ``DERIVED``."""
    kept = vars(owner)
    fields = {name: STORED_AS.get(name, name) for name in (*parameters_of(type(owner)), *DERIVED)}
    return {name: kept[stored] for name, stored in fields.items() if stored in kept}


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else str(name), inner)
    else:
        yield prefix, _plain(value)


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return str.__str__(value) if isinstance(value, str) else value  # an enum's member is text too
    if isinstance(value, Path | torch.dtype):
        return str(value)
    if isinstance(value, Strategy):
        about = {name: _plain(inner) for name, inner in value.describe().items()}
        return f"{about.pop('name')}({', '.join(f'{name}={inner!r}' for name, inner in about.items())})"
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return f"{type(value).__module__}.{type(value).__qualname__}"


# --- what may change ----------------------------------------------------------------------------------


class Change(NamedTuple):
    """One setting that a resumed run and its checkpoint do not share."""

    name: str
    now: Any
    then: Any

    def __str__(self) -> str:
        return f"{self.name}={self.now} (checkpoint: {self.then})"


class Point(NamedTuple):
    """Where the checkpoint is in the run, and what the resumed run plans."""

    step: int
    phase: str
    grown: bool
    total_steps: int
    swap_step: int | None
    growth_step: int | None
    identity: frozenset[str]  # names of what the data module wants unchanged

    @classmethod
    def of(cls, module: Any, trainer: L.Trainer, identity: Mapping[str, Any], step: int) -> "Point":
        """Args: identity: the checkpoint's; step: its optimizer step."""
        names = (name for name, _ in _flat("data", trainer.datamodule.identity()))
        grown = identity.get("growth_step") is not None
        planned = module.swap_step, module.growth_step
        return cls(step, identity["phase"], grown, module.total_steps(), *planned, frozenset(names))


Rule = Callable[[Change, Point], str | None]  # why a change is refused; None where the resumed run goes by it


def honoured(change: Change, point: Point) -> None:
    return None


def fixed(reason: str) -> Rule:
    return lambda change, point: reason


def while_dense(change: Change, point: Point) -> str | None:
    return None if point.phase == "dense" else "the dense phase is over"


def until_swap(change: Change, point: Point) -> str | None:
    return None if point.phase == "dense" else "the dense model has been upcycled by it already"


def until_growth(change: Change, point: Point) -> str | None:
    return "the MoE has grown by it already" if point.grown else None


def moved_swap(change: Change, point: Point) -> str | None:
    return until_swap(change, point) or _is_past(point.swap_step, point)


def moved_growth(change: Change, point: Point) -> str | None:
    return until_growth(change, point) or _is_past(point.growth_step, point)


def _is_past(planned: int | None, point: Point) -> str | None:
    past = planned is not None and planned < point.step
    return f"that is optimizer step {planned}, and the checkpoint is at step {point.step}" if past else None


def steps_left(change: Change, point: Point) -> str | None:
    if point.total_steps > point.step:
        return None
    return f"the fit would end at optimizer step {point.total_steps}, and the checkpoint is at step {point.step}"


def same_dtype(change: Change, point: Point) -> str | None:
    """Mixed precision leaves parameters in float32; a "-true" one casts them."""
    now, then = (kind if kind.endswith("-true") else "32-true" for kind in map(str, (change.now, change.then)))
    return None if now == then else "parameters, optimizer and harvested experts are kept in another dtype"


def data_of_before(change: Change, point: Point) -> str | None:
    return "the order of the data, or the data itself, would be another" if change.name in point.identity else None


COUNTED = "optimizer steps and epochs are counted by it"
RULES: tuple[tuple[str, Rule], ...] = (  # the first pattern that fits a name counts
    ("seed_everything", fixed("weights, order of the data and all that is drawn come from it")),
    ("trainer.max_*", steps_left),
    ("trainer.accumulate_grad_batches", fixed(COUNTED)),
    ("trainer.limit_train_batches", fixed(COUNTED)),
    ("trainer.overfit_batches", fixed(COUNTED)),
    ("trainer.fast_dev_run", fixed("it would train on a few batches in the run's own directory")),
    ("trainer.precision", same_dtype),
    ("data.*", data_of_before),
    ("model*.model", fixed("the weights are those of the checkpoint")),
    ("model*.config*", fixed("the weights are those of the checkpoint")),
    ("model*.compile", honoured),
    ("model*.cuda_graphs", honoured),
    ("model*.gradient_checkpointing", honoured),
    ("model*.trust_remote_code", honoured),
    ("model*.max_new_tokens", honoured),
    ("model.dense.*", while_dense),
    ("model.moe.num_experts", until_swap),
    ("model.moe.top_k", until_swap),
    ("ExpertHarvest.keep", honoured),
    ("ExpertHarvest*", fixed("experts have been harvested by it since the start")),
    ("Upcycling.at_*", moved_swap),
    ("Upcycling.drift_examples", honoured),
    ("Upcycling.expansion_device", honoured),
    ("Upcycling*", until_swap),
    ("ExpertGrowth.at_*", moved_growth),
    ("ExpertGrowth.drift_examples", honoured),
    ("ExpertGrowth.expansion_device", honoured),
    ("ExpertGrowth*", until_growth),
    ("*", honoured),
)


def rule_of(name: str) -> Rule:
    return next(rule for pattern, rule in RULES if fnmatchcase(name, pattern))


def changes(now: Record, then: Record) -> list[Change]:
    """Settings that differ. A callback that only one of the two has is one change, not one for each argument."""
    owners = {name for name in now.keys() ^ then.keys() if "." not in name}
    found = []
    for name in dict.fromkeys([*now, *then]):
        missing = ABSENT if name in owners else None
        ours, theirs = now.get(name, missing), then.get(name, missing)
        if ours != theirs and (name in owners or name.partition(".")[0] not in owners):
            found.append(Change(name, ours, theirs))
    return found


def check(found: list[Change], point: Point) -> None:
    """Raises: ValueError: settings that a resumed run can't change, each with its reason."""
    reasons = [(change, rule_of(change.name)(change, point)) for change in found]
    refused = [f"{change}: {reason}" for change, reason in reasons if reason]
    if refused:
        raise ValueError(
            "the checkpoint was written under settings that a resumed run can't change:\n  "
            + "\n  ".join(refused)
            + "\nSet them back as they were, or start a run of its own without ckpt_path."
        )


# --- what Lightning's own callbacks keep --------------------------------------------------------------


def adapt_callbacks(trainer: L.Trainer, states: dict[str, Any], ckpt_path: str | Path | None) -> list[Change]:
    """Change the states that callbacks are about to take from a checkpoint, where they would undo a setting of now.

    An ``EarlyStopping`` would go back to the checkpoint's patience. A ``ModelCheckpoint`` would forget its best
    checkpoints where the run's folder has another name than before: moved, or named by another path.

    Returns: the settings that differ.
    """
    found = []
    for callback in trainer.callbacks:
        state = states.get(callback.state_key)
        if isinstance(callback, EarlyStopping) and state and state["patience"] != callback.patience:
            found.append(Change("EarlyStopping.patience", callback.patience, state["patience"]))
            state["patience"] = callback.patience
        if isinstance(callback, ModelCheckpoint) and state and ckpt_path:
            old, new = Path(state["dirpath"]), Path(str(callback.dirpath))
            if old != new and _is_moved(old, new, Path(trainer.default_root_dir), Path(ckpt_path)):
                states[callback.state_key] = _moved(state, old, new)
    return found


def _is_moved(old: Path, new: Path, run: Path, ckpt_path: Path) -> bool:
    """Whether a folder of a run's checkpoints is the one of before: at the same place in the run that is resumed."""
    run, new, ckpt_path = run.resolve(), new.resolve(), ckpt_path.resolve()
    if not (new.is_relative_to(run) and ckpt_path.is_relative_to(run)):
        return False
    within = new.relative_to(run).parts
    return old.parts[-len(within) :] == within


def _moved(state: dict[str, Any], old: Path, new: Path) -> dict[str, Any]:
    def path(value: str) -> str:
        return str(new / Path(value).relative_to(old)) if value and Path(value).is_relative_to(old) else value

    single = ("best_model_path", "kth_best_model_path", "last_model_path")
    best = {path(name): score for name, score in state["best_k_models"].items()}
    return {**state, "dirpath": str(new), "best_k_models": best, **{key: path(state[key]) for key in single}}
