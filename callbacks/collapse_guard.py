"""Act when the router collapses onto a few experts."""

import warnings
from typing import Any, Literal

from lightning.pytorch import Callback
from typing_extensions import override

from callbacks.scalars import log_now
from upit.core.batches import token_mask
from upit.evaluation.collapse import balance_of, collapsed
from upit.evaluation.metrics import ExpertLoad
from upit.model.routers import last_routing


class CollapseGuard(Callback):
    """Watch each layer's expert load over windows of training steps; warn, raise the balance weight, or stop.

    Counts stay on the device; only every ``window`` steps do they reach the host, and are logged as
    ``router/min_share`` and ``router/min_entropy``.

    Args:
        window: optimizer steps between looks.
        min_share: least load of an expert, as a part of an even share; ours.
        min_entropy: least entropy of a layer's load, as a part of an even load's; ours.
        action: what to do about it beside the warning.
        factor: by how much "raise_weight" multiplies ``load_balancing_weight``, each time.
        max_weight: as far as it goes.
    Raises: ValueError: an argument out of range, or a weight that "raise_weight" can't raise.
    """

    def __init__(
        self,
        window: int = 50,
        min_share: float = 0.1,
        min_entropy: float = 0.5,
        action: Literal["warn", "raise_weight", "stop"] = "warn",
        factor: float = 2.0,
        max_weight: float = 0.1,
    ) -> None:
        if window < 1:
            raise ValueError(f"CollapseGuard.window={window} must be at least 1")
        for field, value in (("min_share", min_share), ("min_entropy", min_entropy)):
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"CollapseGuard.{field}={value} must lie in [0, 1]")
        if factor <= 1.0:
            raise ValueError(f"CollapseGuard.factor={factor} must be above 1")
        self.window = window
        self.min_share = min_share
        self.min_entropy = min_entropy
        self.action = action
        self.factor = factor
        self.max_weight = max_weight
        self.looked_at: int | None = None  # optimizer step that the window begins after; None before any fit
        self.load: ExpertLoad | None = None  # of the window so far
        self.weight: float | None = None  # the raised one
        self.raised_from: float | None = None  # the configured one

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        moe = getattr(pl_module, "moe", pl_module)
        if stage != "fit" or moe.phase != "moe" or self.action != "raise_weight":
            return
        if not moe.load_balancing_weight:
            raise ValueError("CollapseGuard.action=raise_weight multiplies load_balancing_weight, which is 0")
        if self.max_weight <= moe.load_balancing_weight:
            raise ValueError(
                f"CollapseGuard.max_weight={self.max_weight} must be above "
                f"load_balancing_weight={moe.load_balancing_weight}, which raise_weight raises"
            )

    @override
    def on_train_start(self, trainer, pl_module) -> None:
        if self.looked_at is None:
            self.looked_at = trainer.global_step
        # of a resumed run
        if self.weight is not None:
            if pl_module.active.load_balancing_weight == self.raised_from:
                pl_module.active.load_balancing_weight = self.weight
            else:  # it was configured anew, and that counts
                self.weight = self.raised_from = None
        if self.load is not None:
            self.load.to(pl_module.device)

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.active.phase != "moe":
            return
        self._count(pl_module, batch)
        if trainer.global_step - self.looked_at >= self.window:
            self.looked_at = trainer.global_step
            self._look(trainer, pl_module)

    def on_upcycling_end(self, trainer, module, event) -> None:
        self.looked_at, self.load = trainer.global_step, None  # a window of the experts of now

    on_growth_end = on_upcycling_end

    def _count(self, module, batch) -> None:
        logits_DTE, expert_ids_DTK = last_routing(module.lm)
        weight_T = token_mask(batch).float()
        if self.load is None:
            self.load = ExpertLoad(len(logits_DTE), logits_DTE.shape[-1]).to(weight_T.device)
        self.load.update(expert_ids_DTK, weight_T)

    def _look(self, trainer, module) -> None:
        share_DE, entropy_D = balance_of(self.load.compute())  # type: ignore[union-attr]
        self.load = None
        log_now(trainer, {"router/min_share": float(share_DE.min()), "router/min_entropy": float(entropy_D.min())})
        lines = collapsed(share_DE, entropy_D, min_share=self.min_share, min_entropy=self.min_entropy)
        if lines:
            warnings.warn(
                f"step {trainer.global_step}: the router collapses ({self._act(trainer, module.active)}). "
                + "; ".join(lines),
                stacklevel=2,
            )

    def _act(self, trainer, moe) -> str:
        """Do what is configured; says what."""
        if self.action == "stop":
            trainer.should_stop = True
            return "stopping"
        if self.action == "raise_weight":
            now = moe.load_balancing_weight
            self.raised_from = now if self.raised_from is None else self.raised_from
            self.weight = moe.load_balancing_weight = max(now, min(self.factor * now, self.max_weight))
            return f"load_balancing_weight is now {self.weight:g}"
        return "nothing done; see CollapseGuard.action"

    @override
    def state_dict(self) -> dict[str, Any]:
        # of several ranks, rank 0's counts stand for all
        counts = None if self.load is None else self.load.counts_DE.cpu()
        return {
            "looked_at": self.looked_at,
            "counts_DE": counts,
            "weight": self.weight,
            "raised_from": self.raised_from,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.looked_at = state_dict["looked_at"]
        counts_DE = state_dict["counts_DE"]
        if counts_DE is not None:
            self.load = ExpertLoad(*counts_DE.shape)
            self.load.counts_DE = counts_DE.double()
        self.weight = state_dict["weight"]
        self.raised_from = state_dict["raised_from"]
