"""The swap: expand the harvested experts, initialise the router, and let the module become a MoE mid-run."""

from pathlib import Path

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from typing_extensions import override

from callbacks.event import UpcyclingEvent, callback_of, follow_module
from callbacks.harvest import ExpertHarvest
from upit.core.choice import check_descriptions
from upit.core.distributed import rank
from upit.expansion.expand import check_choices
from upit.expansion.merging import Merge
from upit.expansion.selection import Even, Parents, Selection
from upit.expansion.similarity import Similarity
from upit.model.families import is_expert
from upit.preparation.checks import checked_initialisation, checked_pool
from upit.preparation.expert import Expert
from upit.preparation.placement import borrowed
from upit.preparation.sources import ExpertSource, Harvested
from upit.report.run import Run
from upit.router_init import RouterInit, RoutingVectors
from upit.router_init.scoring import SeedScorer
from upit.router_init.seeds import Assignment, LowestPerplexity, draw_seed
from upit.upcycling.non_experts import LastNonExperts, NonExperts, check_filled
from upit.upcycling.rehearsal import rehearse_assignment, rehearse_router


class Upcycling(UpcyclingEvent):
    """Stages 2 to 4 of UpIT (arXiv:2410.01610), between two optimizer steps of a running fit.

    Exactly one of ``at_epoch`` and ``at_step`` says when; the swap happens before the first batch after that
    point, so the epoch's validation and checkpoints still see the dense model.

    Args:
        at_epoch: epochs of dense training; may be a fraction.
        at_step: optimizer steps of dense training.
        source: where the experts come from; default the harvested pool, ``Harvested()``.
        merge: how two parents become one more expert; default ``Dare()``.
        parents: which two; default ``MostDissimilar()``.
        similarity: how alike two experts are; default ``Cosine()`` of their task vectors (ours).
        selection: which ones are left out where there are more than wanted; default ``Even()`` (ours).
        seed_fraction: part of the training set drawn as seed data; 0.01 is the paper's.
        assignment: who gets which seed example; default ``LowestPerplexity()``.
        router: initialisation of the router; default ``RoutingVectors()``.
        non_experts: where all other parameters come from; default ``LastNonExperts()`` (ours).
        drift_examples: held-out examples whose logits are compared before and after the swap.
        seed: of all that is drawn (alphas, masks, noise, seed data, starting vectors); default the run's
            ``seed_everything``.
        expansion_device: what merges and compares experts: "cpu", "cuda" (the process's own) or "cuda:N"; default the
            GPU that trains, if there is room for the work, else the CPU. A GPU keeps the experts that fit into what
            training leaves free; it draws other masks than the CPU.
    Raises: ValueError, in ``setup`` or before: settings that can't work, named with their values.

    A metric of one phase does not exist in the other: ``EarlyStopping`` on ``moe/val_loss`` needs ``strict: false``.
    """

    name = "upcycling"
    drift_tag = "moe/swap_drift_kl"
    dev_step = 2
    patience = "let it watch moe/val_loss with strict=False"

    def __init__(
        self,
        at_epoch: float | None = None,
        at_step: int | None = None,
        source: ExpertSource | None = None,
        merge: Merge | None = None,
        parents: Parents | None = None,
        similarity: Similarity | None = None,
        selection: Selection | None = None,
        seed_fraction: float = 0.01,
        assignment: Assignment | None = None,
        router: RouterInit | None = None,
        non_experts: NonExperts | None = None,
        drift_examples: int = 64,
        seed: int | None = None,
        expansion_device: str | None = None,
    ) -> None:
        super().__init__(at_epoch, at_step, merge, parents, similarity, drift_examples, seed, expansion_device)
        if not 0.0 < seed_fraction <= 1.0:
            raise ValueError(f"seed_fraction={seed_fraction} must lie in (0, 1]")
        self.source = source or Harvested()
        self.selection = selection or Even()
        self.seed_fraction = seed_fraction
        self.assignment = assignment or LowestPerplexity()
        self.router = router or RoutingVectors()
        self.non_experts = non_experts or LastNonExperts()
        check_descriptions(self)

    # --- before the fit ------------------------------------------------------------------------------

    @override
    def plan(self, trainer, module) -> None:
        for callback in trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} keeps copies of the dense weights and would save them as the MoE's; "
                    "remove it from trainer.callbacks"
                )
        self.harvest = callback_of(trainer, ExpertHarvest, reason="Upcycling needs the experts that are saved by")
        self.harvest.keep_rest = self.non_experts.of_pool
        dense = module.outline()
        if dense is not None:  # else the swap is done, and its choices with it
            self._check_choices(trainer, module, dense)
            module.plan_swap(self._checked_step(trainer, module, dense))

    def _check_choices(self, trainer, module, dense) -> None:
        """Whether the choices go with one another and with the dense model's outline."""
        if self.non_experts.of_pool and not self.source.whole:
            raise ValueError(
                f"Upcycling.non_experts={self.non_experts} averages over checkpoints, but those of "
                f"source={self.source} come without the parameters it needs; use upit.upcycling.LastNonExperts"
            )
        self.source.check(dense, trainer.datamodule.tokenizer)
        self.non_experts.check(dense)
        num_experts = module.moe.num_experts
        self.router.check(dense.config, num_experts)
        rehearse_router(self.router, dense.config, num_experts)
        rehearse_assignment(self.assignment, num_experts)

    def _checked_step(self, trainer, module, dense) -> int:
        """The swap's step; everything that depends on it works."""
        step, num_experts = self.planned_step(trainer, module), module.moe.num_experts
        if trainer.fast_dev_run:
            self.harvest.at_steps = list(range(1, step + 1))
            self.seed_fraction = min(1.0, 2 * num_experts / len(trainer.datamodule.train_set))
        points = self.harvest.plan(module, epochs=self.epochs(trainer, module))
        if not points:
            raise ValueError(f"{self.when} (step {step}) comes before the first harvest; harvest earlier")
        available = self.source.count(len(points), num_experts)
        metrics = self.source.metrics([module.metrics_by(point) for point in points], num_experts)
        check_choices(available, num_experts, self.parents, metrics)
        shapes = {name: tuple(param.shape) for name, param in dense.named_parameters() if is_expert(name)}
        known = {"available": available, "num_experts": num_experts, "metrics": metrics}
        self.rehearse(trainer, shapes, self.harvest.dtype, selection=self.selection, **known)
        counts = [self.source.count(harvested, num_experts) for harvested in range(1, len(points) + 1)]
        self.harvest.least = 1 + sum(count < min(2, num_experts) for count in counts)
        self._seed_indices(trainer, num_experts)
        return step

    def _seed_indices(self, trainer, num_experts: int) -> list[int]:
        size = len(trainer.datamodule.train_set)
        return draw_seed(size, fraction=self.seed_fraction, seed=self.seed, minimum=num_experts)

    @override
    def on_fit_start(self, trainer, pl_module) -> None:
        if rank() == 0 and not pl_module.grown:
            Run(trainer.default_root_dir).forget_growth()

    # --- the swap ------------------------------------------------------------------------------------

    @override
    def due_at(self, module) -> int | None:
        return module.swap_step if module.phase == "dense" else None

    @override
    def change(self, trainer, module) -> None:
        """Expand, score the seed data, initialise the router, swap; else leave the dense model as it was."""
        with borrowed(module.lm, keep=self._overwritten) as loan:
            experts, router_DEH = self._prepare(trainer, module)
            with self.timed("swap"):
                module.upcycle(experts, router_DEH)
                loan.forfeit()
                follow_module(trainer)

    def _overwritten(self, name: str) -> bool:
        """Whether the stages before the swap may overwrite a parameter of the dense model."""
        return self.non_experts.overwrites or is_expert(name)

    def _prepare(self, trainer, module) -> tuple[list[Expert], Tensor]:
        """The experts and the router of the MoE."""
        run = Path(trainer.default_root_dir) / "upcycling"
        data, dense = trainer.datamodule, module.lm
        with self.timed("expansion"):
            harvest, num_experts = self.harvest.collect(), module.moe.num_experts
            pool = self.source.experts(
                harvest,
                dense,
                num_experts=num_experts,
                output=run / "experts",
                seed=self.seed,
                track=self.bar("Preparing experts"),
            )
            announced = self.source.count(len(harvest.experts), num_experts)
            pool = checked_pool(self.source, pool, announced, harvest.base.shapes)
            self.non_experts.fill(dense, pool)
            check_filled(self.non_experts, dense)
            indices = self._seed_indices(trainer, num_experts)
            scorer = SeedScorer(dense, indices, data, file=run / "seed_perplexity.json", autocast=module.autocast)
            self.expansion = self.expand(
                pool,
                harvest.base,
                num_experts,
                run,
                training_on=trainer.strategy.root_device,
                selection=self.selection,
                score=scorer.losses,
            )
        with self.timed("seed_scoring"):
            self.seeds = scorer.assign(
                self.expansion.experts, self.assignment, seed=self.seed, track=self.bar("Scoring seed data")
            )
        with self.timed("router_initialisation"):
            result = self.router(
                dense,
                self.expansion.experts,
                self.seeds,
                data,
                directory=run / "router",
                seed=self.seed,
                autocast=module.autocast,
                track=self.bar("Initialising the router"),
            )
            return checked_initialisation(self.router, result, dense.config, num_experts)
