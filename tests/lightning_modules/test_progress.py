"""A checkpoint of any hook goes on exactly: same batches, same validations and epoch ends, same weights bit by bit."""

from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from lightning_modules import DenseModule
from tests.conftest import TINY, make_trainer, tiny_data

HOOKS = (
    "on_train_start", "on_train_epoch_start", "on_train_batch_start", "on_train_batch_end", "on_validation_start",
    "on_validation_batch_end", "on_validation_end", "on_train_epoch_end", "on_train_end",
)  # fmt: skip


class Kept(Logger):
    """Keeps the step of everything that is logged."""

    name, version = "kept", 0

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[int, str]] = []

    def log_hyperparams(self, *args, **kwargs) -> None: ...

    def log_metrics(self, metrics, step=None) -> None:
        self.lines += [(step, name) for name in metrics if name != "epoch"]


class Diary(Callback):
    """Writes down what happens; saves a checkpoint in every hook, or raises in one training step."""

    def __init__(self, folder: Path | None = None, raise_at: int | None = None) -> None:
        self.folder, self.raise_at = folder, raise_at
        self.events: list[tuple] = []

    def save(self, trainer, hook: str) -> None:
        if self.folder is not None:
            before = len(self.events) - (hook == "on_train_batch_start")  # this batch is not done
            trainer.save_checkpoint(self.folder / f"{len(list(self.folder.iterdir())):03}_{before:03}_{hook}.ckpt")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.events.append((trainer.current_epoch, batch_idx, batch["example_ids"][:, 0].tolist()))
        self.save(trainer, "on_train_batch_start")

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if trainer.global_step == self.raise_at:
            raise RuntimeError("stopped")

    def on_exception(self, trainer, pl_module, exception) -> None:
        self.save(trainer, "on_exception")

    def on_validation_end(self, trainer, pl_module) -> None:
        self.events.append(("validated", trainer.global_step))
        self.save(trainer, "on_validation_end")

    def on_train_epoch_end(self, trainer, pl_module) -> None:
        self.events.append(("epoch", trainer.current_epoch))
        self.save(trainer, "on_train_epoch_end")


def _saves(hook: str):
    return lambda self, trainer, *args: self.save(trainer, hook)


for _hook in HOOKS:
    if _hook not in vars(Diary):
        setattr(Diary, _hook, _saves(_hook))


def run(cache: Path, diary: Diary, ckpt_path=None, *, data: dict | None = None, **trainer):
    module, logger = DenseModule(config=TINY, lr=1e-3), Kept()
    torch.manual_seed(0)
    settings = {"max_epochs": 2, "max_steps": -1, "limit_val_batches": 2, "logger": logger, **trainer}
    fit = make_trainer(cache, [diary], enable_checkpointing=False, **settings)
    fit.fit(
        module,
        datamodule=tiny_data(cache, **{"train_size": 30, "eval_batch_tokens": 256, **(data or {})}),
        ckpt_path=ckpt_path,
        weights_only=True,
    )
    return diary.events, logger.lines, module.state_dict()


def is_tail(part: list, whole: list) -> bool:
    return whole[len(whole) - len(part) :] == part


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


CASES = {
    "grouped, validated within an epoch": {"data": {"packing": False, "batch_size": 20}, "val_check_interval": 2},
    "packed, accumulated, limited": {
        "data": {"batch_size": 1}, "accumulate_grad_batches": 2, "limit_train_batches": 5, "val_check_interval": 3,
    },
    "bounded by steps": {"data": {"packing": False, "batch_size": 30}, "max_epochs": -1, "max_steps": 5},
    "no validation": {"data": {"packing": False, "batch_size": 30}, "limit_val_batches": 0},
}  # fmt: skip


def restarts(folder: Path) -> dict[str, Path]:
    """One checkpoint of each place; most hooks save the same place as the one before."""
    found = {}
    for path in sorted(folder.iterdir()):
        place = torch.load(path, weights_only=True)
        found.setdefault(str((place["loops"]["fit_loop"], path.name.split("_")[1])), path)
    return found


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_hook_s_checkpoint_goes_on_exactly(cache, tmp_path, case):
    events, logged, weights = run(cache, Diary(tmp_path), **case)
    checkpoints = restarts(tmp_path).values()
    assert len(checkpoints) > 6
    for checkpoint in checkpoints:
        again, lines, ended = run(cache, Diary(), checkpoint, **case)
        assert same(ended, weights), checkpoint.name
        assert is_tail(again, events), (checkpoint.name, again, events)
        assert is_tail(lines, logged), (checkpoint.name, lines, logged)
        if again == []:  # the step was the last one by max_steps, and Lightning does nothing more
            continue
        repeated = len(again) - (len(events) - int(checkpoint.name.split("_")[1]))
        most = 2 * case.get("accumulate_grad_batches", 1) - 2  # batches of the window, and validations within it
        assert 0 <= repeated <= most, (checkpoint.name, repeated, again, events)


@pytest.mark.parametrize("packing", [True, False])
def test_a_stop_within_a_window_goes_on_from_its_beginning(cache, tmp_path, packing):
    settings = {"data": {"packing": packing, "batch_size": 2}, "accumulate_grad_batches": 4, "max_epochs": 1}
    _, _, weights = run(cache, Diary(), **settings)
    with pytest.raises(RuntimeError, match="stopped"):
        run(cache, Diary(tmp_path, raise_at=1), **settings)
    (checkpoint,) = tmp_path.glob("*on_exception.ckpt")
    for workers in (0, 2):
        settings["data"]["num_workers"] = workers
        again, _, ended = run(cache, Diary(), checkpoint, **settings)
        assert same(ended, weights)
        assert again[0][:2] == (0, 4)
