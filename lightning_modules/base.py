"""What the dense and the MoE module share: building, steps, optimizer, and identity in checkpoints."""

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal, Self

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from lightning.pytorch.trainer.states import TrainerFn, TrainerStatus
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_modules import horizon, resume
from lightning_modules.accumulation import TokenWindow
from lightning_modules.evaluated import EvaluatedModule
from lightning_modules.monitors import PhaseCheckpoints, check_monitors, check_supported, declared
from lightning_modules.optimizers import AdamW, adamw, take_settings
from lightning_modules.progress import settle
from lightning_modules.stops import stop
from lightning_modules.strategies import check_strategy
from upit.core.batches import IGNORE, Batch
from upit.core.distributed import all_sum, gathered, world_size
from upit.core.finite import FiniteWatch, not_finite
from upit.evaluation.metrics import WeightedMeans
from upit.model.cuda_graphs import GraphedBody, check_capturable
from upit.model.forward import Body, body_states, response_loss
from upit.model.loading.build import rebuild
from upit.model.loading.identity import IDENTITY, identity_in, identity_of, read_identity
from upit.model.sharding import shard

SETTINGS = "settings"  # of the run, in the identity; see lightning_modules.resume
MEANS = "upit_means"  # of the training steps since the last logged one, in checkpoints


class CausalLMModule(EvaluatedModule):
    """A causal LM fine-tuned on the response tokens of instruction data.

    Args:
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; norms have none.
        betas: of AdamW.
        schedule: of the learning rate, over the steps of this module's own phase.
        warmup_fraction: part of the phase's steps in which the rate rises linearly.
        compile: compile each decoder layer in place (keys stay; layers share one graph), for training steps only:
            validation and generation meet many shapes and run eagerly.
        cuda_graphs: run the decoder's body in training steps as CUDA graphs, see
            :class:`upit.model.cuda_graphs.GraphedBody`; for small models, whose kernels end before the host has
            launched the next. One GPU; nothing on a CPU.
        gradient_checkpointing: recompute each layer's activations in the backward pass.
        trust_remote_code: allow model code that comes with the weights.
        max_new_tokens: longest generated answer; default by the reference's length, 256 where there is none.
    """

    means: WeightedMeans  # of the terms of this phase's objective, since the last logged step

    def __init__(
        self,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_fraction: float = 0.03,
        compile: bool = False,
        cuda_graphs: bool = False,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__(max_new_tokens)
        within = {
            "lr": (lr, math.inf),
            "weight_decay": (weight_decay, math.inf),
            "warmup_fraction": (warmup_fraction, 1),
        }
        for field, (value, most) in within.items():
            if not 0 <= value <= most:
                raise ValueError(f"{type(self).__name__}.{field}={value} must lie in [0, {most}]")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"{type(self).__name__}.betas={betas} must lie in [0, 1)")
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.schedule = schedule
        self.warmup_fraction = warmup_fraction
        if cuda_graphs and gradient_checkpointing:
            raise ValueError("cuda_graphs and gradient_checkpointing exclude one another; turn one of them off")
        self.compile_layers = compile
        self.cuda_graphs = cuda_graphs
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.body: Body = body_states  # of training steps
        self.swap_step: int | None = None
        self.growth_step: int | None = None
        self._settings: resume.Record | None = None  # of this fit
        self._checkpoints = PhaseCheckpoints()
        self._changed = False  # since the checkpoint that this fit goes on from
        self._set_aside: list[torch.optim.Optimizer] = []
        self._has_trained = False  # in this fit
        self._window = TokenWindow()
        self._watch = FiniteWatch(lambda name, step: stop(self, f"the {name}", step))
        self._means_before: Tensor | None = None  # totals of the means when the window began
        self.last_fit = False  # nothing is done with model and optimizer once the fit is over, as on the command line

    # --- the phase -----------------------------------------------------------------------------------

    @property
    def phases(self) -> "list[CausalLMModule]":
        """The modules that are active in turn."""
        return [self]

    def enter(self, identity: dict[str, Any]) -> None:
        """Be what a checkpoint's identity says; raises ValueError when this module can't."""
        if identity["phase"] != self.phase:
            raise ValueError(
                f"the checkpoint holds a {identity['phase']} model but {type(self).__name__} is {self.phase}; "
                "use lightning_modules.UpITModule for both, or the module of that phase"
            )

    @property
    def owed_step(self) -> int | None:
        """Optimizer step of an upcycling or growth that is planned and has not happened yet."""
        return None

    @abstractmethod
    def objective(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """Training loss of a batch, the terms to log, and their weight.

        The weight is the number of response tokens, the mean of the ranks' counts. Under gradient accumulation a
        batch counts in the optimizer step by the same weight.
        """

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """Build the model this module starts from."""

    # --- what is logged -------------------------------------------------------------------------------

    def training_metrics(self) -> set[str]:
        """Names of what a training step logs."""
        return {"train/loss", *(f"{self.phase}/{name}" for name in self.means.names)}

    @override
    def configure_callbacks(self) -> Any:
        if self.trainer.state.fn == TrainerFn.FITTING:  # the one hook before those of the callbacks
            check_supported(self.trainer)
        return super().configure_callbacks()

    @override
    def setup(self, stage: str) -> None:
        check_strategy(self.trainer)
        if stage == "fit":
            if any(phase.cuda_graphs for phase in self.phases):
                self._check_graphs()
            horizon.check_validation(self.trainer)
            check_monitors(self, self.trainer)
            self._settings, self._changed = resume.record(self, self.trainer), False
            self._has_trained = False
            if self.resumed is not None:  # on the command line; else the checkpoint is known when it is loaded
                self._changes_since(self.resumed, self.resumed["global_step"])

    def _check_graphs(self) -> None:
        """Raises: ValueError: the run is none that CUDA graphs can hold."""
        trainer = self.trainer
        if trainer.world_size > 1 or isinstance(trainer.strategy, ModelParallelStrategy):
            raise ValueError(
                f"cuda_graphs=True is for one device without a strategy, not for {trainer.world_size} with "
                f"{type(trainer.strategy).__name__}; leave it out"
            )
        if not trainer.datamodule.packing:
            raise ValueError("cuda_graphs=True needs batches of one shape: set data.packing=true, or leave it out")
        graphed_moe = any(phase.cuda_graphs for phase in self.phases if phase.phase == "moe")
        if graphed_moe and trainer.strategy.root_device.type == "cuda":
            check_capturable(trainer.precision)

    # --- building ------------------------------------------------------------------------------------

    @property
    def resumed(self) -> dict[str, Any] | None:
        """Identity of the checkpoint that the command line resumes."""
        return read_identity(self.trainer.ckpt_path) if self.trainer.ckpt_path else None

    @override
    def configure_model(self) -> None:
        if self.active.model is not None or self._trainer is None:  # load_from_checkpoint builds what it finds
            return
        identity = self.resumed
        if identity is not None:
            self.enter(identity)
        self.active.model = rebuild(identity) if identity else self.active.load()
        self.active.finish(self.trainer, self.lm)

    def finish(self, trainer: L.Trainer, model: PreTrainedModel) -> None:
        """Shard and compile a model that was just built, and put it in training mode."""
        if isinstance(trainer.strategy, ModelParallelStrategy):
            shard(model, trainer.strategy.device_mesh["data_parallel"])
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
            # else layers whose routers keep what they said are not compiled: it need not be kept again
            torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True
        if self.compile_layers:
            for layer in model.model.layers:
                layer.compile()
            torch.compiler.set_stance("force_eager")  # but for training_step
        self.body = GraphedBody() if self.cuda_graphs and model.device.type == "cuda" else body_states
        model.train()

    def release(self) -> None:
        """Let go of the model, and of what was captured of it."""
        self.model, self.body = None, body_states

    # --- steps ---------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.compiler.set_stance("default"):
            loss, terms, tokens = self.active.objective(batch)
        self._watch.add("loss", self.trainer.global_step + 1, loss)
        if self._accumulates:
            first = batch_idx % self.trainer.accumulate_grad_batches == 0
            self._means_before = self.active.means.totals_2N.clone() if first else self._means_before
            self._window.add(tokens, first=first)
        self.active.means.update(torch.stack(list(terms.values())) * tokens, tokens.expand(len(terms)))
        if self._is_logged(batch_idx):
            self._log_means()
        return loss

    @property
    def _accumulates(self) -> bool:
        return self.trainer.accumulate_grad_batches > 1

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if not self._accumulates:
            super().backward(loss, *args, **kwargs)
            return
        super().backward(loss * self._window.weight, *args, **kwargs)

    def _is_logged(self, batch_idx: int) -> bool:
        """Whether a batch is the last of an optimizer step that ``trainer.log_every_n_steps`` picks."""
        trainer = self.trainer
        every = trainer.log_every_n_steps
        ends_step = (batch_idx + 1) % trainer.accumulate_grad_batches == 0 or trainer.is_last_batch
        return every > 0 and ends_step and (trainer.global_step + 1) % every == 0

    def _log_means(self) -> None:
        """Log the means since the last logged step; the one place of the training step where ranks and host wait.

        To the loggers directly: Lightning would log the dense phase's last value again with every value of the MoE's.
        """
        self._watch.settle()
        means = self.active.means.compute()
        if not means:  # no response token since the last logged step
            return
        self.active.means.reset()
        values = {"train/loss": means["lm_loss"]} | {f"{self.active.phase}/{name}": m for name, m in means.items()}
        for name, value in values.items():
            self.log(name, value, prog_bar=name == "train/loss", logger=False)
        self._checkpoints.release(values)
        numbers = {name: float(value) for name, value in values.items()}
        for logger in self.loggers:
            logger.log_metrics({"epoch": self.current_epoch, **numbers}, step=self.global_step)
            logger.save()

    def lm_loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean cross entropy of the response tokens, and how many they are.

        The count is the mean of the ranks' counts, and the loss is divided by it: the mean of the ranks' losses is
        then the mean over all their tokens. Without a response token on any rank the loss is 0.
        """
        loss, targets_L = response_loss(self.lm, batch, body=self.body)
        count = (targets_L != IGNORE).sum(dtype=torch.float32)
        if world_size() > 1:  # a loss that is not finite on one rank becomes so on all, and they stop together
            count, total = all_sum(torch.stack([count, loss.detach()])) / world_size()
            loss = loss + 0.0 * total
        return loss / count.clamp(min=1 / world_size()), count

    # --- optimisation --------------------------------------------------------------------------------

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch."""
        return horizon.steps_per_epoch(self.trainer)

    def total_steps(self) -> int:
        """Optimizer steps of the whole fit."""
        return horizon.total_steps(self.trainer)

    def milestones(self) -> list[str]:
        """What happens at which optimizer step of the fit, in words; each is one of its first lines."""
        return []

    @override
    def on_fit_start(self) -> None:
        if self.trainer.is_global_zero:
            print("\n".join([horizon.described(self.trainer), *self.milestones()]), flush=True)

    def phase_steps(self) -> int:
        """Optimizer steps of the active phase: the horizon of its learning-rate schedule."""
        return self.total_steps()

    @override
    def configure_optimizers(self) -> Any:
        return self.active.optimizers_for(self.phase_steps())

    def optimizers_for(self, steps: int) -> dict[str, Any]:
        """AdamW and a schedule with a horizon of ``steps``."""
        optimizer, scheduler = adamw(
            self.parameters(),
            steps,
            lr=self.lr,
            weight_decay=self.weight_decay,
            betas=self.betas,
            schedule=self.schedule,
            warmup_fraction=self.warmup_fraction,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    @override
    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Called once a window of micro-batches, at its last: the closure runs that one."""

        def closure() -> Any:
            assert optimizer_closure is not None
            loss = optimizer_closure()
            self._window.scale(self, divided_by=self.trainer.accumulate_grad_batches)
            return loss

        super().optimizer_step(epoch, batch_idx, optimizer, closure if self._accumulates else optimizer_closure)
        self._window.close()

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        norm = gradient_clip_val if gradient_clip_algorithm in (None, "norm") else None
        unsharded = isinstance(self.trainer.strategy, SingleDeviceStrategy | DDPStrategy)
        if norm and unsharded and isinstance(optimizer, AdamW) and optimizer.clips:
            total = optimizer.clip(norm)
            if getattr(self.trainer.precision_plugin, "scaler", None) is None:  # float16's scaler skips such steps
                self._watch.add("gradients' norm", self.trainer.global_step + 1, total)
        else:
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)

    # --- numbers that are not finite -----------------------------------------------------------------

    def check_finite(self) -> None:
        """Check the training losses and the gradients' norms so far, and the weights; waits for them. A collective.

        Called before anything is made of the model: a checkpoint, a harvest, a validation, the next model.

        Raises: NotFiniteError: one is NaN or infinite.
        """
        self._watch.settle()
        names = sorted(set().union(*gathered(not_finite(dict(self.lm.named_parameters())))))
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            stop(self, f"the weight {names[0]!r}{more} at the end", self.trainer.global_step)

    @override
    def on_validation_start(self) -> None:
        if self.trainer.state.fn == TrainerFn.FITTING:
            self.check_finite()

    @override
    def on_train_epoch_end(self) -> None:
        self.check_finite()  # before callbacks export the model at the end of the fit

    # --- resuming ------------------------------------------------------------------------------------

    def _changes_since(self, identity: dict[str, Any], step: int) -> list[resume.Change]:
        """Settings that differ from those of a checkpoint.

        Raises: ValueError: one of them can't be changed; see :data:`lightning_modules.resume.RULES`.
        """
        if identity.get(SETTINGS) is None or self._settings is None:
            raise ValueError(
                "the checkpoint does not say under which settings it was trained: an older upit wrote it, or it was "
                "not saved in a fit. Use it for validate, test, predict and export, and start the fit anew"
            )
        changes = resume.changes(self._settings, identity[SETTINGS])
        resume.check(changes, resume.Point.of(self, self.trainer, identity, step))
        return changes

    def _go_on_from(self, checkpoint: dict[str, Any]) -> None:
        """Take what differs from the checkpoint's settings, and say so."""
        changes = self._changes_since(checkpoint[IDENTITY], checkpoint["global_step"])
        changes += resume.adapt_callbacks(self.trainer, checkpoint.get("callbacks", {}), self.trainer.ckpt_path)
        self._changed = bool(changes)
        for change in changes:
            rank_zero_info(f"resumed with {change}")

    @override
    def on_train_start(self) -> None:
        self._has_trained = True
        self._checkpoints.hold(self.trainer)
        if self._changed:  # the optimizer has the checkpoint's settings by now
            fresh = self.active.optimizers_for(self.phase_steps())
            (optimizer,), (schedule,) = self.trainer.optimizers, self.trainer.lr_scheduler_configs
            take_settings(optimizer, schedule.scheduler, fresh["optimizer"], fresh["lr_scheduler"]["scheduler"])

    # --- checkpoints by a metric ---------------------------------------------------------------------

    @override
    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        # the loggers' step, which Lightning may count once too often after a resume
        self.trainer.fit_loop.epoch_loop._batches_that_stepped = self.trainer.global_step
        # metrics that callbacks log whenever they like
        if self._checkpoints.awaited & declared(self.trainer, self.active.phase):
            self._checkpoints.release(declared(self.trainer, self.active.phase) & self.trainer.callback_metrics.keys())

    @override
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            names = self.active.validation_metrics() | declared(self.trainer, self.active.phase)
            self._checkpoints.release(names)

    # --- the end of a fit ----------------------------------------------------------------------------
    # Lightning then moves optimizer and model to the host, which takes seconds, in vain if it is the last fit

    @override
    def on_train_end(self) -> None:
        self._checkpoints.release(self._checkpoints.awaited)
        if self.last_fit:
            self._set_aside, self.trainer.strategy.optimizers = self.trainer.strategy.optimizers, []

    @property
    def _is_at_its_end(self) -> bool:
        """Whether a fit is running that resumed a run's last checkpoint, and had nothing to train."""
        trainer = self._trainer
        if trainer is None or (trainer.state.fn, trainer.state.status) != (TrainerFn.FITTING, TrainerStatus.RUNNING):
            return False
        return bool(trainer.ckpt_path) and not self._has_trained

    @override
    def on_fit_end(self) -> None:
        """Finish a run whose last checkpoint is resumed: it may have been stopped within its final scores or export.

        Lightning's loop returns at once then and tells no callback that training starts or ends.
        """
        if self._is_at_its_end:
            rank_zero_info(f"nothing is left to train after optimizer step {self.trainer.global_step}")
            self.trainer.fit_loop.on_run_start()
            self.trainer.fit_loop.on_run_end()

    @override
    def cpu(self) -> Self:
        if not self.last_fit and not self._is_at_its_end:
            return super().cpu()
        if self._set_aside:  # back, for who saves a checkpoint in on_fit_end
            self.trainer.strategy.optimizers, self._set_aside = self._set_aside, []
        return self

    # --- identity in checkpoints ---------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says about the model; see :func:`upit.model.loading.identity.identity_of`."""
        return identity_of(self.lm, phase=self.active.phase, swap_step=self.swap_step)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check_finite()
        checkpoint[IDENTITY] = self.identity() | {SETTINGS: self._settings}
        # of several ranks, rank 0's stand for all; an open window is trained again, see settle
        checkpoint[MEANS] = self.active.means.totals(self._means_before if self._window.is_open else None)
        if self.trainer.state.fn == TrainerFn.FITTING:
            settle(checkpoint["loops"]["fit_loop"], self.trainer)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        identity = identity_in(checkpoint, "the checkpoint")
        if "hyper_parameters" in checkpoint:
            rank_zero_warn("the checkpoint's hyper_parameters are ignored: upit writes none, and the config decides")
        self.enter(identity)
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            self._go_on_from(checkpoint)
        if self.active.model is None:
            self.active.model = rebuild(identity)
            if self._trainer is not None:
                self.active.finish(self._trainer, self.lm)
        self.active.means.restore(checkpoint.get(MEANS, {}))
