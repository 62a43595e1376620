"""More experts later: a second upcycling event in the same fit."""

from pathlib import Path

import torch
from typing_extensions import override

from callbacks.event import UpcyclingEvent, callback_of, follow_module
from callbacks.protocol import upcycles
from callbacks.upcycling import Upcycling
from upit.core.choice import check_descriptions
from upit.core.distributed import rank
from upit.expansion.merging import Merge
from upit.expansion.selection import Parents
from upit.expansion.similarity import Similarity
from upit.model.families import is_expert, moe_config
from upit.preparation.checks import checked_rows
from upit.preparation.pool import Pool
from upit.report.run import LINEAGE_FILE, Run, read_lineage
from upit.upcycling.growth import MergedRows, NewRows, router_of, trained_experts
from upit.upcycling.rehearsal import rehearse_rows


class ExpertGrowth(UpcyclingEvent):
    """Grows the MoE of a running fit from N to M experts, between two optimizer steps of its post-training (ours).

    All N trained experts stay, with their routers' rows. The others are bred from them as in the first upcycling:
    parents, crossover and mutation of task vectors against the harvested base. Everything goes to ``<run>/growth``.
    Optimizer and learning-rate schedule start anew, the schedule over the steps that are left.

    Exactly one of ``at_epoch`` and ``at_step`` says when, as for :class:`Upcycling`, which the fit needs too.

    Args:
        at_epoch: epochs since the start of the fit; may be a fraction.
        at_step: optimizer steps since the start of the fit.
        num_experts: M; default twice as many as the MoE has.
        merge: how two parents become one more expert; default ``Dare()``.
        parents: which two; default ``MostDissimilar()``. Trained experts carry no metrics to choose by.
        similarity: how alike two experts are, by their parameters; default ``Cosine()`` of their task vectors.
        router: rows of the new experts; default ``MergedRows()``.
        drift_examples: held-out examples whose logits are compared before and after.
        seed: of all that is drawn; default the run's ``seed_everything`` and 1, so that nothing is drawn twice.
        expansion_device: what merges and compares experts: "cpu", "cuda" (the process's own) or "cuda:N"; default the
            GPU that trains, if there is room for the work, else the CPU. A GPU keeps the experts that fit into what
            training leaves free; it draws other masks than the CPU.
    Raises: ValueError, in ``setup`` or before: settings that can't work, named with their values.
    """

    name = "growth"
    drift_tag = "moe/growth_drift_kl"
    dev_step = 3
    patience = "raise its patience"
    seed_offset = 1

    def __init__(
        self,
        at_epoch: float | None = None,
        at_step: int | None = None,
        num_experts: int | None = None,
        merge: Merge | None = None,
        parents: Parents | None = None,
        similarity: Similarity | None = None,
        router: NewRows | None = None,
        drift_examples: int = 64,
        seed: int | None = None,
        expansion_device: str | None = None,
    ) -> None:
        super().__init__(at_epoch, at_step, merge, parents, similarity, drift_examples, seed, expansion_device)
        if self.similarity.needs_losses:
            raise ValueError(
                f"ExpertGrowth.similarity={self.similarity} compares losses on seed data, of which growth has none; "
                "use upit.expansion.Cosine or Euclidean"
            )
        try:
            self.parents.check(metrics=())
        except ValueError as error:
            raise ValueError(
                f"ExpertGrowth.parents: {error}: trained experts come with no metrics; "
                "use upit.expansion.MostDissimilar, MostSimilar or RandomParents"
            ) from None
        self.num_experts = num_experts
        self.router = router or MergedRows()
        check_descriptions(self)

    # --- before the fit ------------------------------------------------------------------------------

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit" and upcycles(pl_module):
            pl_module.plan_growth(self._target(pl_module))

    @override
    def plan(self, trainer, module) -> None:
        self.upcycling = callback_of(trainer, Upcycling, reason="ExpertGrowth grows the MoE that is made by")
        if any(isinstance(callback, ExpertGrowth) and callback is not self for callback in trainer.callbacks):
            raise ValueError("trainer.callbacks has ExpertGrowth twice; the MoE of a fit grows once")
        if module.moe.num_experts < 2:
            raise ValueError("ExpertGrowth merges two experts, but num_experts=1 of the MoE; give it at least 2")
        if self._target(module) <= module.moe.num_experts:
            raise ValueError(
                f"ExpertGrowth.num_experts={self.num_experts} must be above the MoE's {module.moe.num_experts}; raise "
                "it, or leave it out for twice as many"
            )
        step, swap = self.planned_step(trainer, module), self.upcycling.planned_step(trainer, module)
        if step <= swap:
            raise ValueError(f"{self.when} is optimizer step {step}, but the swap is at step {swap}: grow after it")
        dense = module.outline()
        if dense is not None:
            shapes = {name: tuple(param.shape) for name, param in dense.named_parameters() if is_expert(name)}
            config = moe_config(dense.config, num_experts=module.moe.num_experts, top_k=module.moe.top_k)
            self._rehearse(trainer, module, shapes, config)
        module.plan_growth(self._target(module), step)

    def _rehearse(self, trainer, module, shapes, config) -> None:
        before, after = module.moe.num_experts, self._target(module)
        self.rehearse(trainer, shapes, None, available=before, num_experts=after)
        rehearse_rows(self.router, config, before, after)

    def _target(self, module) -> int:
        return 2 * module.moe.num_experts if self.num_experts is None else self.num_experts

    @override
    def on_train_start(self, trainer, pl_module) -> None:
        if self.due_at(pl_module) is not None:  # resumed after the swap: are its base and lineage still there?
            base = self.upcycling.harvest.collect().base
            read_lineage(Path(trainer.default_root_dir) / self.upcycling.name / LINEAGE_FILE)
            self._rehearse(trainer, pl_module, base.shapes, pl_module.lm.config)

    # --- the growth ----------------------------------------------------------------------------------

    @override
    def due_at(self, module) -> int | None:
        return module.growth_step if module.phase == "moe" and not module.grown else None

    @override
    def change(self, trainer, module) -> None:
        """Write the trained experts, breed more, give the MoE all of them."""
        run = Run(trainer.default_root_dir)
        directory = run.directory / "growth"
        with self.timed("growth"):
            base = self.upcycling.harvest.collect().base
            pool = trained_experts(
                module.lm,
                run.lineages[0],
                directory / "experts",
                step=trainer.global_step,
                epoch=trainer.global_step / module.steps_per_epoch(),
                track=self.bar("Writing experts"),
            )
            device = trainer.strategy.root_device
            self.expansion = self.expand(pool, base, self._target(module), directory, training_on=device)
            if rank() == 0:
                Pool(directory / "experts").gather(base, self.expansion.experts)
            router_DNH = router_of(module.lm)
            new_rows = self.router(router_DNH, self.expansion.lineage, module.lm.config, seed=self.seed)
            layers, before, hidden = router_DNH.shape
            new_rows = checked_rows(self.router, new_rows, (layers, self._target(module) - before, hidden))
            module.grow(self.expansion.experts, torch.cat([router_DNH, new_rows], dim=1))
            follow_module(trainer)
