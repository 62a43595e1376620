"""One module from dense to MoE: it owns the phase and delegates to the module of that phase."""

from collections.abc import Sequence
from copy import copy
from typing import Any

from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from lightning_modules.base import CausalLMModule
from lightning_modules.dense import DenseModule
from lightning_modules.moe import MoEModule
from lightning_modules.monitors import logged
from upit.model.families import grown_config, moe_config
from upit.model.loading.build import build, outline
from upit.model.loading.identity import config_of
from upit.preparation.expert import Expert
from upit.upcycling.assemble import upcycle

SHOWN = 16  # harvest points in the first lines of a fit; ours


class UpITModule(CausalLMModule):
    """Instruction-tunes ``dense``, then, once upcycled by ``callbacks.Upcycling``, post-trains ``moe``.

    Only one of the two holds a model at a time; the trainer's module stays this object throughout. ``moe`` may get
    more experts later, from ``callbacks.ExpertGrowth``.

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
        self.harvest_steps: list[int] = []  # planned
        self.grown = False
        self.grown_experts: int | None = None  # planned
        self.growth_step: int | None = None  # planned, or where it was

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
        return logged(self, self.trainer, by=step)["dense"]

    @override
    def enter(self, identity: dict[str, Any]) -> None:
        grown = identity.get("growth_step") is not None
        if identity["phase"] == "moe":
            self._check_counts(identity, grown)
        if (identity["phase"], grown) != (self.phase, self.grown):
            self.active.release()
        self.phase, self.grown = identity["phase"], grown
        if self.phase == "moe":  # what has not happened yet is where this run's config puts it
            self.swap_step = identity["swap_step"]
        if grown:
            self.growth_step = identity["growth_step"]

    def _check_counts(self, identity: dict[str, Any], grown: bool) -> None:
        """Raises: ValueError: the checkpoint's MoE has other counts than this run's config."""
        found, top_k = identity["num_experts"], identity["config"]["num_experts_per_tok"]
        field, wanted = "num_experts", self.moe.num_experts
        if grown and self.grown_experts is not None:
            field, wanted = "ExpertGrowth.num_experts", self.grown_experts
        if found != wanted:
            lacks = grown and self.grown_experts is None
            also = (
                f"; it grew at step {identity['growth_step']}: add callbacks.ExpertGrowth as it was" if lacks else ""
            )
            raise ValueError(f"the checkpoint has {found} experts but {field}={wanted}{also}")
        if top_k != self.moe.top_k:
            raise ValueError(f"the checkpoint routes to {top_k} experts but top_k={self.moe.top_k}")

    @override
    def identity(self) -> dict[str, Any]:
        return super().identity() | {"growth_step": self.growth_step if self.grown else None}

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
        config = moe_config(self.lm.config, num_experts=len(experts), top_k=self.moe.top_k)
        self.moe.model = self._built(config, experts, router_DEH)
        self.dense.release()
        self.phase = "moe"
        self.swap_step = self.trainer.global_step
        self._checkpoints.hold(self.trainer)

    def grow(self, experts: Sequence[Expert], router_DEH: Tensor) -> None:
        """Take a MoE with more experts in place of this one; everything else goes on from it."""
        config = grown_config(self.lm.config, num_experts=len(experts))
        self.moe.model = self._built(config, experts, router_DEH)
        self.grown = True
        self.growth_step = self.trainer.global_step
        self._checkpoints.hold(self.trainer)

    def _built(self, config: PretrainedConfig, experts: Sequence[Expert], router_DEH: Tensor) -> PreTrainedModel:
        """A MoE filled from the model in use; until it takes its place, checkpoints hold that one alone."""
        trainer = self.trainer
        with trainer.strategy.tensor_init_context():
            model = build(config)
        model.generation_config = copy(self.lm.generation_config)  # for the export
        model = model.to(trainer.strategy.root_device)
        self.moe.finish(trainer, model)
        upcycle(model, self.lm, experts, router_DEH)
        return model

    @override
    def phase_steps(self) -> int:
        """Optimizer steps from one upcycling to the next; a growth restarts the schedule too (ours)."""
        total = self.total_steps()
        bounds = [0, *(min(step or total, total) for step in (self.swap_step, self.growth_step)), total]
        now = 0 if self.phase == "dense" else 1 + self.grown
        return bounds[now + 1] - bounds[now]

    def plan_harvest(self, steps: Sequence[int]) -> None:
        """Say at which optimizer steps experts are harvested."""
        self.harvest_steps = list(steps)

    @override
    def milestones(self) -> list[str]:
        said = []
        if self.phase == "dense" and self.harvest_steps:
            steps = list(map(str, self.harvest_steps))
            shown = steps if len(steps) <= SHOWN else [*steps[: SHOWN - 1], "...", steps[-1]]
            said.append(f"{len(steps)} harvest points, after steps {', '.join(shown)}")
        if self.swap_step is not None:
            said.append(f"swap after step {self.swap_step}")
        if self.growth_step is not None:
            said.append(f"growth after step {self.growth_step}")
        return said

    @property
    @override
    def owed_step(self) -> int | None:
        if self.phase == "dense":
            return self.swap_step
        return None if self.grown else self.growth_step

    def plan_swap(self, step: int) -> None:
        """Say at which optimizer step the swap will be; the dense schedule ends there."""
        if self.phase == "dense":
            self.swap_step = step

    def plan_growth(self, num_experts: int, step: int | None = None) -> None:
        """Say how many experts the MoE grows to, and in a fit at which optimizer step; a schedule ends there."""
        self.grown_experts = num_experts
        if not self.grown:
            self.growth_step = step

    @override
    def objective(self, batch):
        raise RuntimeError("the phase's own module computes the loss")

    @override
    def load(self):
        raise RuntimeError("the phase's own module loads its model")
