"""Callbacks for fits of several processes: what each rank holds, and a swap that is saved and fails in its midst."""

from pathlib import Path

import torch
from lightning.pytorch import Callback

import upit.router_init.scoring


class KeepRanks(Callback):
    """Saves every rank's parameters right after the swap and at the end, as ``<run>/<when>_rank<n>.pt``."""

    def on_upcycling_end(self, trainer, module, upcycling) -> None:
        self._save(trainer, module, "swap")

    def on_train_end(self, trainer, pl_module) -> None:
        self._save(trainer, pl_module, "end")

    def _save(self, trainer, module, when: str) -> None:
        state = {name: param.detach().clone() for name, param in module.lm.named_parameters()}
        torch.save(state, Path(trainer.default_root_dir) / f"{when}_rank{trainer.global_rank}.pt")


class FailWhileScoring(Callback):
    """Saves ``handler.ckpt`` while the first expert stands in the model, and ``exception.ckpt`` when a pass fails."""

    def on_upcycling_start(self, trainer, module, upcycling) -> None:
        score, calls = upit.router_init.scoring.score_examples, []

        def scoring(model, *args, **kwargs):
            calls.append(score(model, *args, **kwargs))
            if len(calls) == 1:
                self._save(trainer, "handler")
                model.model.layers[-1].mlp.register_forward_pre_hook(self._fail)
            return calls[-1]

        upit.router_init.scoring.score_examples = scoring

    def _fail(self, *_) -> None:
        raise RuntimeError("failed in the middle of a pass")

    def on_exception(self, trainer, pl_module, exception) -> None:
        self._save(trainer, "exception")

    def _save(self, trainer, name: str) -> None:
        trainer.save_checkpoint(Path(trainer.default_root_dir) / f"checkpoints/{name}.ckpt")
