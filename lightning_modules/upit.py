"""One module from dense to MoE: it owns the phase and delegates to the module of that phase."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_modules.base import CausalLMModule
from lightning_modules.dense import DenseModule
from lightning_modules.moe import MoEModule
from lightning_modules.monitors import first_validation, logged
from upit.checkpoints import config_of
from upit.families import moe_config
from upit.models import build, outline
from upit.pool import Expert
from upit.upcycling import upcycle


class UpITModule(CausalLMModule):
    """Instruction-tunes ``dense``, then, once upcycled by ``callbacks.Upcycling``, post-trains ``moe``.

    Only one of the two holds a model at a time; the trainer's module stays this object throughout.

    Args:
        dense: module of the dense phase.
        moe: module of the post-training; its ``model`` must be None.
    """

    def __init__(self, dense: DenseModule, moe: MoEModule) -> None:
        super().__init__()
        if moe.source is not None:
            raise ValueError(f"moe.model={moe.source!r}: leave it out, this MoE is upcycled from the dense model")
        self.dense = dense
        self.moe = moe
        self.phase = "dense"

    @property
    @override
    def active(self) -> CausalLMModule:
        return self.dense if self.phase == "dense" else self.moe

    @property
    @override
    def phases(self) -> list[CausalLMModule]:
        return [self.dense, self.moe]

    def metrics_by(self, step: int) -> set[str]:
        """Names of the metrics that the dense phase has logged by an optimizer step."""
        validated = first_validation(self.trainer, self.batches_per_epoch()) < step
        missing = set() if validated else self.dense.validation_metrics()
        return logged(self, self.trainer)["dense"] - missing

    @override
    def enter(self, identity: dict[str, Any]) -> None:
        config, moe = identity["config"], self.moe
        if identity["phase"] == "moe" and identity["num_experts"] != moe.num_experts:
            raise ValueError(f"the checkpoint has {identity['num_experts']} experts but num_experts={moe.num_experts}")
        if identity["phase"] == "moe" and config["num_experts_per_tok"] != moe.top_k:
            raise ValueError(f"the checkpoint routes to {config['num_experts_per_tok']} experts but top_k={moe.top_k}")
        if identity["phase"] != self.phase:
            self.active.model = None
        self.phase = identity["phase"]
        if self.phase == "moe":  # before it, the swap is where this run's config puts it
            self.swap_step = identity["swap_step"]

    def outline(self) -> PreTrainedModel | None:
        """The dense model without weights, as it will be once built; None where the run has swapped already.

        Raises: ValueError: it can't be upcycled.
        """
        identity = self.resumed
        if identity and identity["phase"] == "moe":
            return None
        config = config_of(identity) if identity else self.dense.architecture()
        moe_config(config, num_experts=self.moe.num_experts, top_k=self.moe.top_k)
        return outline(config)

    def upcycle(self, experts: Sequence[Expert], router_DEH: Tensor) -> None:
        """Leave the dense phase: build the MoE as Lightning would have, fill it, drop the dense model."""
        trainer, dense = self.trainer, self.lm
        config = moe_config(dense.config, num_experts=len(experts), top_k=self.moe.top_k)
        with trainer.strategy.tensor_init_context():
            model = build(config)
        self.moe.model = model.to(trainer.strategy.root_device)
        self.moe.finish(trainer)
        upcycle(self.moe.lm, dense, experts, router_DEH)
        self.dense.model = None
        self.phase = "moe"
        self.swap_step = trainer.global_step

    @override
    def phase_steps(self) -> int:
        total = self.total_steps()
        swap = min(self.swap_step or total, total)
        return swap if self.phase == "dense" else total - swap

    def plan_swap(self, step: int) -> None:
        """Say at which optimizer step the swap will be; the dense schedule ends there."""
        if self.phase == "dense":
            self.swap_step = step

    @override
    def objective(self, batch):
        raise RuntimeError("the phase's own module computes the loss")

    @override
    def load(self):
        raise RuntimeError("the phase's own module loads its model")
