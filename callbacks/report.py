"""Scores at the four stages, the export, and the table at the end."""

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from tqdm.auto import tqdm
from typing_extensions import override

from callbacks.protocol import UpcyclingModule
from upit.artefacts import Run
from upit.distributed import rank
from upit.export import export_model, model_card
from upit.files import write_json
from upit.report import print_report
from upit.sharding import full


class RunReport(Callback):
    """Score the held-out questions at each stage, write ``<run>/report.json``, export, print a table.

    Stages: ``base`` (before training), ``dense`` (right before the swap), ``swap`` (right after), where the MoE grows
    ``moe`` (right before) and ``growth`` (right after), and ``final``.

    Args:
        export: write the final model to ``<run>/export`` in stock transformers format.
    """

    def __init__(self, export: bool = True) -> None:
        self.export = export
        self.report: dict[str, Any] = {
            "stages": {}, "num_experts": None, "top_k": None, "seed_counts": [], "wall_seconds": {},
        }  # fmt: skip

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        self.run = Path(trainer.default_root_dir)

    @override
    def on_train_start(self, trainer, pl_module) -> None:
        if rank() == 0:
            (self.run / "tokenizer").mkdir(parents=True, exist_ok=True)
            trainer.datamodule.tokenizer.save_pretrained(self.run / "tokenizer")
        if trainer.ckpt_path is None:
            self._score(trainer, pl_module, "base")
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
        if self.export:
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
        """Gather the model one tensor at a time (every rank takes part), write it on rank 0."""
        weights = {}
        params = list(module.lm.named_parameters())
        for name, param in tqdm(params, "Collecting weights", leave=False, disable=rank() > 0):
            whole = full(param)
            if rank() == 0:
                weights[name] = whole.cpu()
        if rank() > 0:
            return
        output = self.run / "export"
        if output.exists():  # a resumed run exports again, beside
            output = next(p for i in range(2, 1000) if not (p := self.run / f"export-{i}").exists())
        card = model_card(module.identity() | {"global_step": trainer.global_step}, self.run, name=output.name)
        export_model(module.lm.config, weights, trainer.datamodule.tokenizer, output, card=card)

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"report": self.report}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.report = state_dict["report"]
