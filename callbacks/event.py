"""What the upcycling and a later growth share: when they happen, whom they tell, and what follows a new model."""

import gc
import time
from abc import abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, Timer
from lightning.pytorch.strategies import DDPStrategy
from tqdm.auto import tqdm
from typing_extensions import override

from callbacks.protocol import UpcyclingModule, require_upcycling
from callbacks.scalars import log_now
from upit.core.distributed import broadcast, rank
from upit.core.files import write_json
from upit.core.gpu import CPU, HAS_TRITON
from upit.core.points import step_at
from upit.core.run_seed import run_seed
from upit.evaluation.scores import drift, reference_logits
from upit.expansion.device_cache import checked_device, usual_device
from upit.expansion.expand import Expansion, expand
from upit.expansion.merging import Dare, Merge
from upit.expansion.selection import Even, MostDissimilar, Parents, Selection
from upit.expansion.similarity import Cosine, Similarity
from upit.model.loading.identity import last_checkpoint
from upit.preparation.expert import Expert
from upit.report.run import LINEAGE_FILE, write_lineage
from upit.upcycling.rehearsal import rehearse_expansion

C = TypeVar("C", bound=Callback)
TRUE_DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}  # of parameters, by the trainer's precision


class UpcyclingEvent(Callback):
    """Puts another model in the place of the module's, between two optimizer steps of a running fit.

    Other callbacks are told by ``on_<name>_start`` and ``on_<name>_end`` (trainer, module, event).
    """

    name: ClassVar[str]
    drift_tag: ClassVar[str]
    dev_step: ClassVar[int]  # under fast_dev_run
    patience: ClassVar[str]  # what to do about an EarlyStopping that did not wait for the event
    seed_offset: ClassVar[int] = 0  # from the run's seed, so that two events draw different numbers

    def __init__(
        self,
        at_epoch: float | None,
        at_step: int | None,
        merge: Merge | None,
        parents: Parents | None,
        similarity: Similarity | None,
        drift_examples: int,
        seed: int | None,
        expansion_device: str | None,
    ) -> None:
        if (at_epoch is None) == (at_step is None):
            raise ValueError(f"give one of at_epoch and at_step: got at_epoch={at_epoch}, at_step={at_step}")
        if drift_examples < 1:
            raise ValueError(f"drift_examples={drift_examples} must be at least 1")
        self.at_epoch = at_epoch
        self.at_step = at_step
        self.merge = merge or Dare()
        self.parents = parents or MostDissimilar()
        self.similarity = similarity or Cosine()
        self.drift_examples = drift_examples
        self.given_seed = seed
        self.seed = seed or 0  # set in setup, when the run's seed is known
        self.expansion_device = expansion_device
        self.wall_seconds: dict[str, float] = {}

    # --- before the fit ------------------------------------------------------------------------------

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            self.seed = run_seed() + self.seed_offset if self.given_seed is None else self.given_seed
            require_upcycling(pl_module, self)
            if self.expansion_device is not None:
                checked_device(self.expansion_device, f"{type(self).__name__}.expansion_device")
            if trainer.fast_dev_run:
                _widen_fast_dev_run(trainer)
            self.plan(trainer, pl_module)

    @abstractmethod
    def plan(self, trainer, module: UpcyclingModule) -> None:
        """Tell the module what is planned, once all that can be checked before training is.

        Raises: ValueError: settings that can't work, named with their values.
        """

    def rehearse(
        self,
        trainer,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype | None,
        *,
        available: int,
        num_experts: int,
        metrics: Sequence[Collection[str]] = (),
        selection: Selection | None = None,
    ) -> None:
        """Dry call of the expansion's choices; see :func:`upit.upcycling.rehearsal.rehearse_expansion`.

        Args:
            dtype: of the experts' files; None for that of the training.
        """
        on = trainer.strategy.root_device
        device = checked_device(self.expansion_device, "expansion_device") if self.expansion_device else on
        rehearse_expansion(
            merge=self.merge,
            parents=self.parents,
            similarity=self.similarity,
            selection=selection or Even(),
            metrics=metrics,
            available=available,
            num_experts=num_experts,
            shapes=shapes,
            dtype=dtype or TRUE_DTYPES.get(trainer.precision, torch.float32),
            device=device if device.type == "cuda" and HAS_TRITON else CPU,
        )

    @property
    def when(self) -> str:
        """The setting that says when, for errors."""
        said = f"at_step={self.at_step}" if self.at_epoch is None else f"at_epoch={self.at_epoch}"
        return f"{type(self).__name__}.{said}"

    def epochs(self, trainer, module: UpcyclingModule) -> float:
        """How many epochs after the start of the fit the event comes."""
        step = self.dev_step if trainer.fast_dev_run else self.at_step
        return float(self.at_epoch or 0) if step is None else step / module.steps_per_epoch()

    def planned_step(self, trainer, module: UpcyclingModule) -> int:
        """The optimizer step that the event comes after.

        Raises: ValueError: it is not within the fit.
        """
        step, total = step_at(self.epochs(trainer, module), module.steps_per_epoch()), module.total_steps()
        if not 0 < step < total:
            raise ValueError(
                f"{self.when} is optimizer step {step}, but the fit has {total} steps: "
                "choose a step before its end, or raise trainer.max_epochs"
            )
        return step

    # --- the event -----------------------------------------------------------------------------------

    @abstractmethod
    def due_at(self, module: UpcyclingModule) -> int | None:
        """The optimizer step that the event comes after; None once it has happened, or before it can."""

    @abstractmethod
    def change(self, trainer, module: UpcyclingModule) -> None:
        """Let the module take its new model."""

    @override
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        due_at = self.due_at(pl_module)
        if due_at is None or trainer.global_step < due_at:
            return
        pl_module.check_finite()
        try:
            self._tell(trainer, pl_module, f"on_{self.name}_start")
            self._change_and_compare(trainer, pl_module)
        finally:
            pl_module.train()
        log_now(trainer, {self.drift_tag: self.drift})
        self._tell(trainer, pl_module, f"on_{self.name}_end")

    def _change_and_compare(self, trainer, module: UpcyclingModule) -> None:
        compared = trainer.datamodule, self.drift_examples
        how = {"autocast": module.autocast, "track": self.bar("Comparing logits")}
        module.eval()
        before = reference_logits(module.lm, *compared, **how)
        self.change(trainer, module)
        module.check_finite()
        if any(phase.compile_layers for phase in module.phases):
            gc.collect()  # compiled layers refer to themselves, and so keep the model they were of
        module.eval()
        self.drift = drift(module.lm, before, *compared, **how)

    @override
    def on_fit_end(self, trainer, pl_module) -> None:
        """Raises: MissedEventError: the fit ended before its event; all else has been done by now."""
        due_at = self.due_at(pl_module)
        if due_at is not None:
            hints = [f"EarlyStopping: {self.patience}"] * _has(trainer, EarlyStopping)
            hints += ["trainer.max_time: raise it"] * _has(trainer, Timer)
            checkpoint = last_checkpoint(trainer)
            raise MissedEventError(
                f"the fit ended at optimizer step {trainer.global_step}, before the {self.name} at step {due_at}. "
                f"What may have ended it: {'; '.join(hints) or 'a callback that sets trainer.should_stop'}. "
                + (f"To go on: --ckpt_path {checkpoint}" if checkpoint else "No checkpoint was written.")
            )

    def expand(
        self,
        pool: Sequence[Expert],
        base: Expert,
        num_experts: int,
        directory: Path,
        *,
        training_on: torch.device,
        **choices: Any,
    ) -> Expansion:
        """Breed experts by this event's strategies; lineage and similarity go to ``directory``."""
        needs = base.shapes, max(num_experts, len(pool))
        device = self.expansion_device or broadcast(usual_device(training_on, *needs))
        expansion = expand(
            pool,
            base,
            num_experts=num_experts,
            output=directory / "experts",
            merge=self.merge,
            parents=self.parents,
            similarity=self.similarity,
            seed=self.seed,
            device=device,
            track=self.bar("Expanding experts"),
            **choices,
        )
        if rank() == 0:
            write_lineage(directory / LINEAGE_FILE, expansion.lineage)
            write_json(directory / "similarity.json", expansion.similarity)
        return expansion

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Note the seconds of a stage in ``wall_seconds``."""
        start = time.perf_counter()
        yield
        self.wall_seconds[stage] = time.perf_counter() - start

    def bar(self, text: str):
        """A progress bar on rank 0, to wrap what is worked through."""
        return lambda items, what="": tqdm(items, desc=f"{text} {what}".strip(), leave=False, disable=rank() > 0)

    def _tell(self, trainer, module, hook: str) -> None:
        for callback in trainer.callbacks:
            if hasattr(callback, hook):
                getattr(callback, hook)(trainer, module, self)


class MissedEventError(RuntimeError):
    """A fit ended before its upcycling or growth: the model is not the one that was asked for."""


def _has(trainer, kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in trainer.callbacks)


def callback_of(trainer, kind: type[C], *, reason: str) -> C:
    """The trainer's callback of a kind.

    Raises: ValueError: there is none.
    """
    for callback in trainer.callbacks:
        if isinstance(callback, kind):
            return callback
    raise ValueError(f"{reason} callbacks.{kind.__name__}: add it to trainer.callbacks")


def follow_module(trainer) -> None:
    """Let strategy, optimizer and scheduler follow a module whose parameters were replaced.

    The one place that touches Lightning's private parts: DDP's wrapper would go on with the old parameters. If this
    fails half-way, a checkpoint holds no optimizer state, and resuming it makes a new optimizer, as is done here.
    """
    strategy = trainer.strategy
    strategy.optimizers, strategy.lr_scheduler_configs = [], []
    if isinstance(strategy, DDPStrategy):
        strategy.model = strategy._setup_model(trainer.lightning_module)
    strategy.setup_optimizers(trainer)


def _widen_fast_dev_run(trainer) -> None:
    """Give ``fast_dev_run`` the four optimizer steps that the stages need: two dense, two MoE (one of each size)."""
    trainer.limit_train_batches = 4 * trainer.accumulate_grad_batches
    trainer.fit_loop.epoch_loop.max_steps = 4
