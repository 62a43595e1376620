"""Scores at the four stages, the export, and the table at the end."""

import time
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm
from typing_extensions import override

from callbacks.protocol import UpcyclingModule
from upit.core.distributed import broadcast, rank
from upit.core.files import write_json
from upit.core.tensors import full
from upit.model.loading.identity import config_of, read_identity, read_weights
from upit.report.model_card import model_card
from upit.report.run import Run
from upit.report.terminal import print_report
from upit.upcycling.export import export_model


class RunReport(Callback):
    """Score the held-out questions at each stage, write ``<run>/report.json``, export, print a table.

    Stages: ``base`` (before training), ``dense`` (right before the swap), ``swap`` (right after), where the MoE grows
    ``moe`` (right before) and ``growth`` (right after), and ``final``.

    Args:
        export: which weights to write to ``<run>/export`` in stock transformers format. "last": those at the end of
            the fit. "best": those of the best checkpoint of the ``ModelCheckpoint`` that monitors a metric of the last
            phase, such as ``moe/val_loss``. "none": no export.
    Raises: ValueError: another value, or in ``setup``: "best" without such a ``ModelCheckpoint``.
    """

    def __init__(self, export: Literal["last", "best", "none"] = "last") -> None:
        if export not in ("last", "best", "none"):
            raise ValueError(f"RunReport.export={export!r} must be last, best or none")
        self.export = export
        self.report: dict[str, Any] = {
            "stages": {}, "num_experts": None, "top_k": None, "seed_counts": [], "wall_seconds": {},
        }  # fmt: skip

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        self.run = Path(trainer.default_root_dir)
        if stage == "fit" and self.export == "best":
            self.ranking = _ranking(trainer, pl_module)

    @override
    def on_train_start(self, trainer, pl_module) -> None:
        if rank() == 0:
            (self.run / "tokenizer").mkdir(parents=True, exist_ok=True)
            trainer.datamodule.tokenizer.save_pretrained(self.run / "tokenizer")
        if trainer.ckpt_path is None:
            self._score(trainer, pl_module, "base")
        elif rank() == 0:  # the file may be that of a later step, or of the run's end
            write_json(self.run / "report.json", self.report)
        self._since = time.perf_counter()

    def on_upcycling_start(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self._add_seconds("dense")
        self._score(trainer, module, "dense")

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self.report.update(
            num_experts=module.moe.num_experts,
            top_k=module.moe.top_k,
            seed_counts=upcycling.seeds.counts,
            swap_drift_kl=upcycling.drift,
        )
        self.report["wall_seconds"].update(upcycling.wall_seconds)
        self._score(trainer, module, "swap")
        self._since = time.perf_counter()

    def on_growth_start(self, trainer, module: UpcyclingModule, growth) -> None:
        self._add_seconds("post_training")
        self._score(trainer, module, "moe")

    def on_growth_end(self, trainer, module: UpcyclingModule, growth) -> None:
        self.report.update(num_experts=len(growth.expansion.experts), growth_drift_kl=growth.drift)
        self.report["wall_seconds"].update(growth.wall_seconds)
        self._score(trainer, module, "growth")
        self._since = time.perf_counter()

    @override
    def on_train_end(self, trainer, pl_module) -> None:
        if pl_module.owed_step is not None:  # not the end that was asked for, and the fit fails
            return
        self._add_seconds("post_training" if pl_module.active.phase == "moe" else "dense")
        self._score(trainer, pl_module, "final" if pl_module.active.phase == "moe" else "dense")
        if self.export != "none":
            self._export(trainer, pl_module)
        if rank() == 0:
            self.report["finished"] = True
            write_json(self.run / "report.json", self.report)
            print_report(self.report, Run(self.run).lineage, self.run)

    def _add_seconds(self, stage: str) -> None:
        seconds = self.report["wall_seconds"]
        seconds[stage] = seconds.get(stage, 0.0) + time.perf_counter() - self._since

    def _score(self, trainer, module, stage: str) -> None:
        start = time.perf_counter()
        scores = module.score(track=lambda items: tqdm(items, f"Scoring {stage}", leave=False, disable=rank() > 0))
        self.report["stages"][stage] = {"step": trainer.global_step, **scores}
        seconds = self.report["wall_seconds"]
        seconds["scoring"] = seconds.get("scoring", 0.0) + time.perf_counter() - start
        for logger in trainer.loggers:
            logger.log_metrics(
                {f"eval/{stage}/{key}": value for key, value in scores["average"].items()}, step=trainer.global_step
            )
        if rank() == 0:
            write_json(self.run / "report.json", self.report)

    def _export(self, trainer, module) -> None:
        best = self._best() if self.export == "best" else None
        weights = {} if best else self._gathered(module)
        if rank() > 0:
            return
        config, identity = module.lm.config, module.identity() | {"global_step": trainer.global_step}
        if best:
            identity, weights = read_identity(best["checkpoint"]), read_weights(best["checkpoint"])
            config = config_of(identity)
        output = self.run / "export"
        if output.exists():  # a resumed run exports again, beside
            output = next(p for i in range(2, 1000) if not (p := self.run / f"export-{i}").exists())
        about = {"directory": output.name, "weights": "best" if best else "last", "step": identity["global_step"]}
        self.report["export"] = about | (best or {})
        card = model_card(identity, self.run, name=output.name, weights=self.report["export"])
        generation = identity.get("generation")
        export_model(config, weights, trainer.datamodule.tokenizer, output, card=card, generation=generation)

    def _best(self) -> dict[str, Any] | None:
        """The best checkpoint and what it was chosen by; None where there is none. A collective."""
        ranking = self.ranking
        path = ranking.best_model_path
        if broadcast(bool(path) and Path(path).exists()):
            score = float(torch.as_tensor(ranking.best_model_score))
            return {"checkpoint": path, "monitor": ranking.monitor, "value": score}
        rank_zero_warn(
            f"RunReport.export=best: ModelCheckpoint(monitor={ranking.monitor!r}) has saved no checkpoint, or it was "
            "removed. The last weights are exported"
        )
        return None

    def _gathered(self, module) -> dict[str, Tensor]:
        """The weights in use, on rank 0; a collective, one tensor at a time."""
        weights = {}
        params = list(module.lm.named_parameters())
        for name, param in tqdm(params, "Collecting weights", leave=False, disable=rank() > 0):
            whole = full(param)
            if rank() == 0:
                weights[name] = whole.cpu()
        return weights

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"report": self.report}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ended = ("finished", "export")  # in a checkpoint that was saved at the end of a fit
        self.report = {name: value for name, value in state_dict["report"].items() if name not in ended}


def _ranking(trainer, module) -> ModelCheckpoint:
    """The callback that ranks checkpoints by a metric of the last phase.

    Raises: ValueError: there is none.
    """
    phase = module.phases[-1].phase
    for callback in trainer.checkpoint_callbacks:
        ranks = isinstance(callback, ModelCheckpoint) and callback.save_top_k
        if ranks and (callback.monitor or "").startswith(f"{phase}/"):
            return callback
    raise ValueError(
        "RunReport.export=best exports the best checkpoint of a ModelCheckpoint that monitors a metric of the "
        f"{phase} phase, and trainer.callbacks has none: add one with monitor: {phase}/val_loss, or set export: last"
    )
