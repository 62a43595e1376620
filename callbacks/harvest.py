"""Expert preparation: harvest the expert parameters of intermediate checkpoints."""

import math
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from typing_extensions import override

from callbacks.protocol import UpcyclingModule, require_upcycling
from callbacks.scalars import log_now
from upit.core.distributed import barrier, rank
from upit.core.gpu import host_copy, wait_for_copies
from upit.core.points import points_within, step_at
from upit.core.tensors import full
from upit.model.families import is_expert
from upit.model.loading.identity import resumable_in
from upit.preparation.distance import distance_from
from upit.preparation.pool import Pool
from upit.report.run import Run

METRICS = "upit_metrics"  # in checkpoints
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ExpertHarvest(Callback):
    """Save the expert parameters (FFN) to ``<run>/experts`` at intervals of the dense phase.

    Stage 1 of UpIT (arXiv:2410.01610). Harvests at optimizer-step boundaries: copies the parameters, one at
    a time when they are sharded, and writes them in the background; a GPU's steps go on behind the copy, into pinned
    memory, of which one harvest's is held. The untouched model is kept too, as the base of the task vectors.

    Args:
        every_n_epochs: interval in epochs; 0.25 is the paper's. Used when neither of the others is given. Each point
            is rounded to the nearest optimizer step, as the swap is.
        every_n_steps: interval in optimizer steps.
        at_steps: explicit optimizer steps.
        min_distance: harvest adaptively: skip a point until the experts have moved this far since the last harvest,
            relative to their norm (ours; :func:`upit.preparation.distance.distance_from`, logged as
            ``harvest/distance``). The points above are then how often to look. The last one before the swap is never
            skipped, nor are those without which too few experts would be left to upcycle from; a warning then says how
            far they had moved.
        dtype: of the files; default the parameters' own.
        keep: which harvested experts stay on disk after the swap: "all"; "used", those that became experts of the MoE;
            or "none". The base always stays, a growth needs it. The others are removed once a checkpoint from after
            the swap is complete, looked for at the beginning of each epoch and at the end of the fit. Checkpoints from
            before the swap can't be resumed then; a warning names them.
    Raises: ValueError: an interval or the distance is not positive, or two kinds of points are given.
    """

    def __init__(
        self,
        every_n_epochs: float = 0.25,
        every_n_steps: int | None = None,
        at_steps: list[int] | None = None,
        min_distance: float | None = None,
        dtype: Literal["float32", "bfloat16"] | None = None,
        keep: Literal["all", "used", "none"] = "all",
    ) -> None:
        if every_n_steps is not None and at_steps is not None:
            raise ValueError("give one of every_n_steps and at_steps, not both")
        positive = {"every_n_epochs": every_n_epochs, "every_n_steps": every_n_steps, "min_distance": min_distance}
        for field, value in positive.items():
            if value is not None and value <= 0:
                raise ValueError(f"{field}={value} must be positive")
        if at_steps is not None and (not at_steps or min(at_steps) < 1):
            raise ValueError(f"at_steps={at_steps} must list optimizer steps from 1")
        if keep not in ("all", "used", "none"):
            raise ValueError(f"ExpertHarvest.keep={keep!r} must be all, used or none")
        self.every_n_epochs = every_n_epochs
        self.every_n_steps = every_n_steps
        self.at_steps = at_steps
        self.min_distance = min_distance
        self.dtype = DTYPES[dtype] if dtype else None
        self.keep = keep
        self.swapped_at = 0.0  # time of day of a swap in this process
        self.keep_rest = False  # set by Upcycling where the other parameters are wanted from the pool
        self.least = 1  # experts, set by Upcycling where it needs more
        self.planned: list[int] = []  # optimizer steps to harvest at
        self.steps: list[int] = []  # harvested at
        self.seen_step = 0
        self._past: dict[str, float] = {}  # metrics of before a resume
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="harvest")
        self._pending: list[Future] = []

    def points(self, epochs: float, *, steps_per_epoch: int) -> list[int]:
        """Optimizer steps to harvest at in so many epochs of the dense phase.

        One for each point that the settings ask for, so a step comes twice where two points fall on it.
        """
        until = step_at(epochs, steps_per_epoch)
        if self.at_steps is not None:
            return sorted(step for step in self.at_steps if step <= until)
        if self.every_n_steps is not None:
            return list(range(self.every_n_steps, until + 1, self.every_n_steps))
        return points_within(epochs, every=self.every_n_epochs, steps_per_epoch=steps_per_epoch)

    def plan(self, module: UpcyclingModule, *, epochs: float) -> list[int]:
        """Settle the steps to harvest at, for a dense phase of so many epochs."""
        asked = self.points(epochs, steps_per_epoch=module.steps_per_epoch())
        self.planned = sorted(set(asked))
        module.plan_harvest(self.planned)
        if len(self.planned) < len(asked):
            rank_zero_warn(
                f"ExpertHarvest: the settings ask for {len(asked)} harvests, but they fall on {len(self.planned)} "
                f"different optimizer steps, so at most {len(self.planned)} experts are harvested. An epoch has "
                f"{module.steps_per_epoch()} steps: harvest less often, or lower data.batch_size"
            )
        return self.planned

    @override
    def setup(self, trainer, pl_module, stage: str) -> None:
        if stage == "fit":
            require_upcycling(pl_module, self)

    @override
    def on_fit_start(self, trainer, pl_module) -> None:
        self.directory = Path(trainer.default_root_dir) / "experts"
        if pl_module.phase == "dense" and pl_module.swap_step is None:  # else Upcycling has planned it
            self.plan(pl_module, epochs=pl_module.total_steps() / pl_module.steps_per_epoch())
        if trainer.ckpt_path is None and pl_module.phase == "dense":
            self._save(trainer, pl_module, step=0)

    @override
    def on_train_start(self, trainer, pl_module) -> None:
        if trainer.ckpt_path is not None and pl_module.phase == "dense":
            pool = Pool.load(self.directory)
            if rank() == 0:
                pool.forget_after(trainer.global_step)
            barrier()
            pool.check_steps(self.steps)
            self._harvest(trainer, pl_module)  # of the checkpoint's own step, if it was written before its harvest

    @override
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.phase == "dense":
            self._harvest(trainer, pl_module)

    def _harvest(self, trainer, pl_module: UpcyclingModule) -> None:
        """Harvest if a point has been reached since the last look."""
        step = trainer.global_step
        if not any(self.seen_step < point <= step for point in self.planned):
            return
        self.seen_step = step
        left = sum(point > step for point in self.planned)
        if self._due(trainer, pl_module, left):
            self._save(trainer, pl_module, step=step)

    def _due(self, trainer, module: UpcyclingModule, left: int) -> bool:
        """Whether to harvest at a point that ``left`` more follow; a collective."""
        if self.min_distance is None or not left:
            return True
        distance = self._distance(trainer, module)
        if distance < self.min_distance and len(self.steps) + left < self.least:
            rank_zero_warn(
                f"ExpertHarvest.min_distance={self.min_distance} is too far: the experts moved {distance:.3g} since "
                f"step {self.last_step}. Harvested at step {trainer.global_step} all the same, since the upcycling "
                f"needs {self.least}"
            )
            return True
        return distance >= self.min_distance

    @property
    def last_step(self) -> int:
        """Optimizer step of the last harvest; 0, the base's, before the first."""
        return self.steps[-1] if self.steps else 0

    def _distance(self, trainer, module: UpcyclingModule) -> float:
        """How far the experts are from the last harvested; a collective."""
        self.drain()
        barrier()
        distance = distance_from(module.lm, Pool.load(self.directory).at_step(self.last_step))
        log_now(trainer, {"harvest/distance": distance})
        return distance

    def _save(self, trainer, pl_module: UpcyclingModule, *, step: int) -> None:
        pl_module.check_finite()
        metrics, epoch = self._metrics(trainer), step / pl_module.steps_per_epoch()
        self.drain()
        tensors: dict[str, torch.Tensor] = {}
        rest: dict[str, torch.Tensor] = {}
        for name, param in pl_module.lm.named_parameters():
            if is_expert(name) or self.keep_rest:
                whole = full(param)
                if rank() == 0:
                    # a copy of its own: the optimizer changes the parameter while the writer still reads
                    (tensors if is_expert(name) else rest)[name] = host_copy(whole, self.dtype or whole.dtype)
        if step:
            self.steps.append(step)
        if rank() == 0:
            work = (wait_for_copies(), tensors, rest, step, epoch, metrics)
            self._pending.append(self._writer.submit(self._write, *work))

    def _metrics(self, trainer) -> dict[str, float]:
        """The last value of each metric, of before a resume too, which Lightning forgets."""
        now = {k: float(v) for k, v in trainer.callback_metrics.items() if torch.as_tensor(v).numel() == 1}
        last = self._past | now
        return {name: value for name, value in last.items() if math.isfinite(value)}  # JSON has no NaN

    def _write(self, wait, tensors, rest, step: int, epoch: float, metrics: dict[str, float]) -> None:
        wait()
        pool = Pool(self.directory)
        if step:
            pool.add(tensors, step=step, epoch=epoch, metrics=metrics, rest=rest)
        else:
            pool.set_base(tensors, rest=rest)

    def drain(self) -> None:
        """Wait for the background writer; raises what went wrong there."""
        while self._pending:
            self._pending.pop().result()

    def collect(self) -> Pool:
        """The pool, every harvested expert on disk and checked; a collective.

        Raises: TensorFileError: a file is missing, truncated or changed.
        """
        self.drain()
        barrier()
        pool = Pool.load(self.directory)
        if rank() == 0:
            pool.verify()
        return pool

    @override
    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self.drain()  # a checkpoint vouches for every expert harvested before it
        checkpoint[METRICS] = self._metrics(trainer)

    @override
    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict[str, Any]) -> None:
        self._past = checkpoint.get(METRICS, {})

    @override
    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self.drain()

    # --- after the swap ------------------------------------------------------------------------------

    def on_upcycling_end(self, trainer, module: UpcyclingModule, upcycling) -> None:
        self.swapped_at = time.time()

    @override
    def on_train_epoch_start(self, trainer, pl_module) -> None:
        self._prune(trainer, pl_module)

    @override
    def on_fit_end(self, trainer, pl_module) -> None:
        self.drain()
        if not self._prune(trainer, pl_module):
            rank_zero_warn(
                f"ExpertHarvest.keep={self.keep} removed nothing: the fit has left no checkpoint from after the swap, "
                "which could be resumed without the harvested experts"
            )

    def _prune(self, trainer, module: UpcyclingModule) -> bool:
        """Remove the experts that are not kept, once a checkpoint does without them; False while there is none."""
        if self.keep == "all" or module.phase == "dense" or rank() > 0:
            return True
        pool = Pool(self.directory)
        lineages = Run(trainer.default_root_dir).lineages[:1] if self.keep == "used" else []
        used = {entry["sha256"] for lineage in lineages for entry in lineage}
        steps = [expert.step for expert in pool.experts if expert.sha256 not in used]
        if not steps:
            return True
        folders = {callback.dirpath for callback in trainer.checkpoint_callbacks if getattr(callback, "dirpath", None)}
        saved = {path: own for folder in folders for path, own in resumable_in(folder).items()}
        if not any(own["phase"] == "moe" and path.stat().st_mtime >= self.swapped_at for path, own in saved.items()):
            return False
        freed = pool.prune(steps)
        rank_zero_info(
            f"ExpertHarvest.keep={self.keep}: removed the experts harvested at steps {steps}, "
            f"{freed / 1e6:,.1f} MB freed"
        )
        lost = [
            path.name for path, own in saved.items() if own["phase"] == "dense" and own["global_step"] >= min(steps)
        ]
        if lost:
            rank_zero_warn(
                f"ExpertHarvest.keep={self.keep} removed experts that the swap needs, so these checkpoints from "
                f"before it can't be resumed any more: {', '.join(lost)}"
            )
        return True

    @override
    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "seen_step": self.seen_step}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]
        self.seen_step = state_dict["seen_step"]
