"""The swap: expand the harvested experts, initialise the router, and let the module become a MoE mid-run."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from tqdm.auto import tqdm
from typing_extensions import override

from callbacks.harvest import ExpertHarvest
from callbacks.protocol import require_upcycling
from callbacks.scalars import log_now
from upit.distributed import rank
from upit.evaluation import drift, reference_logits
from upit.expansion import Expansion, check_counts, expand
from upit.expert_sources import ExpertSource, Harvested
from upit.families import check_top_k
from upit.files import write_json
from upit.merging import Dare, Merge
from upit.non_experts import Last, NonExperts
from upit.pool import Expert
from upit.router_init import RouterInit, RoutingVectors
from upit.scoring import SeedScorer
from upit.seed_data import Assignment, LowestPerplexity, draw_seed
from upit.selection import Even, MostDissimilar, Parents, Selection
from upit.similarity import Cosine, Similarity


class Upcycling(Callback):
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
        non_experts: where all other parameters come from; default ``Last()`` (ours).
        drift_examples: held-out examples whose logits are compared before and after the swap.
        seed: of all that is drawn (alphas, masks, noise, seed data, starting vectors); default the run's
            ``seed_everything``.
    Raises: ValueError, in ``setup`` or before: settings that can't work, named with their values.

    A metric of one phase does not exist in the other: ``EarlyStopping`` on ``moe/val_loss`` needs ``strict: false``.
    """

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
    ) -> None:
        if (at_epoch is None) == (at_step is None):
            raise ValueError(f"give one of at_epoch and at_step: got at_epoch={at_epoch}, at_step={at_step}")
        if not 0.0 < seed_fraction <= 1.0:
            raise ValueError(f"seed_fraction={seed_fraction} must lie in (0, 1]")
        if drift_examples < 1:
            raise ValueError(f"drift_examples={drift_examples} must be at least 1")
        self.at_epoch = at_epoch
        self.at_step = at_step
        self.source = source or Harvested()
        self.merge = merge or Dare()
        self.parents = parents or MostDissimilar()
        self.similarity = similarity or Cosine()
        self.selection = selection or Even()
        self.seed_fraction = seed_fraction
        self.assignment = assignment or LowestPerplexity()
        self.router = router or RoutingVectors()
        self.non_experts = non_experts or Last()
        self.drift_examples = drift_examples
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
        self.wall_seconds: dict[str, float] = {}

    # --- before the fit ------------------------------------------------------------------------------

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage != "fit":
            return
        require_upcycling(pl_module, self)
        for callback in trainer.callbacks:
            if isinstance(callback, StochasticWeightAveraging | WeightAveraging):
                raise ValueError(
                    f"{type(callback).__name__} keeps copies of the dense weights and would save them as the MoE's; "
                    "remove it from trainer.callbacks"
                )
        if trainer.fast_dev_run:
            _widen_fast_dev_run(trainer)
        check_top_k(pl_module.moe.num_experts, pl_module.moe.top_k)
        if self.non_experts.of_pool and not self.source.whole:
            raise ValueError(
                f"Upcycling.non_experts={self.non_experts} averages over checkpoints, but those of "
                f"source={self.source} come without the parameters it needs; use upit.non_experts.Last"
            )
        self._check_choices(trainer, pl_module)
        self.harvest = self._harvest_of(trainer)
        self.harvest.keep_rest = self.non_experts.of_pool
        self._plan(trainer, pl_module)

    def _check_choices(self, trainer, module) -> None:
        dense = module.outline()
        if dense is None:
            return
        self.source.check(dense, trainer.datamodule.tokenizer)
        self.non_experts.check(dense)
        self.router.check(dense.config, module.moe.num_experts)

    def _harvest_of(self, trainer) -> ExpertHarvest:
        for callback in trainer.callbacks:
            if isinstance(callback, ExpertHarvest):
                return callback
        raise ValueError("Upcycling needs the experts that callbacks.ExpertHarvest saves: add it to trainer.callbacks")

    def _plan(self, trainer, module) -> None:
        """Fix the swap's step and check everything that depends on it."""
        per_epoch, total = module.steps_per_epoch(), module.total_steps()
        step = total // 2 if trainer.fast_dev_run else self.at_step
        if step is None:
            step = round(float(self.at_epoch or 0) * per_epoch)
        said = f"at_step={self.at_step}" if self.at_epoch is None else f"at_epoch={self.at_epoch}"
        if not 0 < step < total:
            raise ValueError(
                f"Upcycling.{said} is optimizer step {step}, but the fit has {total} steps: "
                "swap before its end, or raise trainer.max_epochs"
            )
        if trainer.fast_dev_run:
            self.harvest.at_steps = list(range(1, step + 1))
            self.seed_fraction = min(1.0, 2 * module.moe.num_experts / len(trainer.datamodule.train_set))
        points = self.harvest.points(until=step, steps_per_epoch=per_epoch)
        if not points:
            raise ValueError(f"Upcycling.{said} (step {step}) comes before the first harvest; harvest earlier")
        num_experts = module.moe.num_experts
        available = self.source.count(len(points), num_experts)
        check_counts(available, num_experts)
        if num_experts > available:
            self.parents.check(self.source.metrics(module.metrics_by(points[-1])))
        counts = [self.source.count(harvested, num_experts) for harvested in range(1, len(points) + 1)]
        self.harvest.least = 1 + sum(count < min(2, num_experts) for count in counts)
        self._seed_indices(trainer, num_experts)
        module.plan_swap(step)

    def _seed_indices(self, trainer, num_experts: int) -> list[int]:
        size = len(trainer.datamodule.train_set)
        return draw_seed(size, fraction=self.seed_fraction, seed=self.seed, minimum=num_experts)

    # --- the swap ------------------------------------------------------------------------------------

    @override
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if pl_module.phase == "dense" and trainer.global_step >= pl_module.swap_step:
            self._notify(trainer, pl_module, "on_upcycling_start")
            self.upcycle(trainer, pl_module)
            self._notify(trainer, pl_module, "on_upcycling_end")

    @override
    def on_train_end(self, trainer, pl_module) -> None:
        if pl_module.phase == "dense":
            rank_zero_warn(
                f"the fit ended at step {trainer.global_step}, before the swap at step {pl_module.swap_step}: "
                "the model is still dense. If EarlyStopping ended it, let it watch moe/val_loss with strict=False"
            )

    def upcycle(self, trainer, module) -> None:
        """Expand, score the seed data, initialise the router, swap."""
        run = Path(trainer.default_root_dir) / "upcycling"
        data, dense, compare = trainer.datamodule, module.lm, self._bar("Comparing logits")
        module.eval()
        before = reference_logits(dense, data, self.drift_examples, autocast=module.autocast, track=compare)
        with self._timed("expansion"):
            harvest, num_experts = self.harvest.collect(), module.moe.num_experts
            pool = self.source.experts(
                harvest,
                dense,
                num_experts=num_experts,
                output=run / "experts",
                seed=self.seed,
                track=self._bar("Preparing experts"),
            )
            self.non_experts.fill(dense, pool)
            indices = self._seed_indices(trainer, num_experts)
            scorer = SeedScorer(dense, indices, data, file=run / "seed_perplexity.json", autocast=module.autocast)
            expansion = self._expand(pool, harvest.base, num_experts, scorer, run)
        with self._timed("seed_scoring"):
            seeds = scorer.assign(
                expansion.experts, self.assignment, seed=self.seed, track=self._bar("Scoring seed data")
            )
        with self._timed("router_initialisation"):
            experts, router_DEH = self.router(
                dense,
                expansion.experts,
                seeds,
                data,
                directory=run / "router",
                seed=self.seed,
                autocast=module.autocast,
                track=self._bar("Initialising the router"),
            )
        with self._timed("swap"):
            module.upcycle(experts, router_DEH)
            follow_module(trainer)
        module.eval()
        self.drift = drift(module.lm, before, data, self.drift_examples, autocast=module.autocast, track=compare)
        module.train()
        self.expansion, self.seeds = expansion, seeds
        log_now(trainer, {"moe/swap_drift_kl": self.drift})

    def _expand(self, pool: list[Expert], base: Expert, num_experts: int, scorer: SeedScorer, run: Path) -> Expansion:
        expansion = expand(
            pool,
            base,
            num_experts=num_experts,
            output=run / "experts",
            merge=self.merge,
            parents=self.parents,
            selection=self.selection,
            similarity=self.similarity,
            seed=self.seed,
            score=scorer.losses,
            track=self._bar("Expanding experts"),
        )
        if rank() == 0:
            write_json(run / "lineage.json", expansion.lineage)
            write_json(run / "similarity.json", expansion.similarity)
        return expansion

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.wall_seconds[stage] = time.perf_counter() - start

    def _bar(self, text: str):
        return lambda items, what="": tqdm(items, desc=f"{text} {what}".strip(), leave=False, disable=rank() > 0)

    def _notify(self, trainer, module, hook: str) -> None:
        """Tell the other callbacks: ``on_upcycling_start`` and ``on_upcycling_end`` (trainer, module, upcycling)."""
        for callback in trainer.callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(trainer, module, self)


def follow_module(trainer) -> None:
    """Let strategy, optimizer and scheduler follow a module whose parameters were replaced.

    The one place that touches Lightning's private parts: DDP's wrapper would go on with the old parameters.
    """
    strategy = trainer.strategy
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy._setup_model(trainer.lightning_module)
    strategy.setup_optimizers(trainer)


def _widen_fast_dev_run(trainer) -> None:
    """Give ``fast_dev_run`` the four optimizer steps that all the stages need: two dense, two MoE."""
    trainer.limit_train_batches = 4 * trainer.accumulate_grad_batches
    trainer.fit_loop.epoch_loop.max_steps = 4


__all__ = ["Upcycling", "follow_module"]
