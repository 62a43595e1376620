"""A callback for fits of several processes: what each rank holds."""

from pathlib import Path

import torch
from lightning.pytorch import Callback


class KeepRanks(Callback):
    """Saves every rank's parameters right after the swap and at the end, as ``<run>/<when>_rank<n>.pt``."""

    def on_upcycling_end(self, trainer, module, upcycling) -> None:
        self._save(trainer, module, "swap")

    def on_train_end(self, trainer, pl_module) -> None:
        self._save(trainer, pl_module, "end")

    def _save(self, trainer, module, when: str) -> None:
        state = {name: param.detach().clone() for name, param in module.lm.named_parameters()}
        torch.save(state, Path(trainer.default_root_dir) / f"{when}_rank{trainer.global_rank}.pt")
