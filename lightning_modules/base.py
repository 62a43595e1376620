"""What the dense and the MoE module share: building, steps, optimizer, and identity in checkpoints."""

import math
from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from transformers import PreTrainedModel, get_scheduler
from typing_extensions import override

from lightning_modules.monitors import check_monitors
from upit.checkpoints import IDENTITY, config_of, identity_of, read_identity
from upit.distributed import all_sum, world_size
from upit.evaluation import Scores, answer_budget, evaluate, greedy_answers
from upit.examples import IGNORE, PADDING, Batch
from upit.forward import response_losses
from upit.losses import grouped_losses
from upit.models import build
from upit.sharding import shard

PREDICT_TOKENS = 256


class CausalLMModule(L.LightningModule):
    """A causal LM fine-tuned on the response tokens of instruction data.

    Args:
        lr: peak learning rate of AdamW.
        weight_decay: of matrices; norms have none.
        betas: of AdamW.
        schedule: of the learning rate, over the steps of this module's own phase.
        warmup_fraction: part of the phase's steps in which the rate rises linearly.
        compile: compile each decoder layer in place (keys stay; layers share one graph), for training steps only:
            validation and generation meet many shapes and run eagerly.
        gradient_checkpointing: recompute each layer's activations in the backward pass.
        trust_remote_code: allow model code that comes with the weights.
        max_new_tokens: longest generated answer; default by the reference's length, 256 where there is none.
    """

    phase: Literal["dense", "moe"]

    def __init__(
        self,
        lr: float = 2e-5,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
        schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine",
        warmup_fraction: float = 0.03,
        compile: bool = False,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
        max_new_tokens: int | None = None,
    ) -> None:
        super().__init__()
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
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"{type(self).__name__}.max_new_tokens={max_new_tokens} must be at least 1")
        self.lr = lr
        self.weight_decay = weight_decay
        self.betas = betas
        self.schedule = schedule
        self.warmup_fraction = warmup_fraction
        self.compile_layers = compile
        self.gradient_checkpointing = gradient_checkpointing
        self.trust_remote_code = trust_remote_code
        self.max_new_tokens = max_new_tokens
        self.model: PreTrainedModel | None = None
        self.swap_step: int | None = None

    # --- the phase -----------------------------------------------------------------------------------

    @property
    def active(self) -> "CausalLMModule":
        """The module whose model is in use: itself, but for the one that joins two phases."""
        return self

    @property
    def phases(self) -> "list[CausalLMModule]":
        """The modules that are active in turn."""
        return [self]

    @property
    def lm(self) -> PreTrainedModel:
        """The causal LM in use."""
        model = self.active.model
        if model is None:
            raise RuntimeError("the model is not built yet; it is in configure_model")
        return model

    def enter(self, identity: dict[str, Any]) -> None:
        """Be what a checkpoint's identity says; raises ValueError when this module can't."""
        if identity["phase"] != self.phase:
            raise ValueError(
                f"the checkpoint holds a {identity['phase']} model but {type(self).__name__} is {self.phase}; "
                "use lightning_modules.UpITModule for both, or the module of that phase"
            )

    @abstractmethod
    def objective(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Training loss of a batch, and the terms to log."""

    @abstractmethod
    def load(self) -> PreTrainedModel:
        """Build the model this module starts from."""

    # --- what is logged -------------------------------------------------------------------------------

    def training_metrics(self) -> set[str]:
        """Names of what a training step logs."""
        return {"train/loss", f"{self.phase}/lm_loss"}

    def validation_metrics(self) -> set[str]:
        """Names of what a validation logs."""
        domains = self.trainer.datamodule.domains
        return {"val/loss", f"{self.phase}/val_loss", *(f"val/loss/{domain}" for domain in domains)}

    @override
    def setup(self, stage: str) -> None:
        if stage == "fit":
            check_monitors(self, self.trainer)

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
        self.active.model = build(config_of(identity)) if identity else self.active.load()
        self.active.finish(self.trainer)

    def finish(self, trainer: L.Trainer) -> None:
        """Shard and compile a model that was just built, and put it in training mode."""
        model = self.lm
        if isinstance(trainer.strategy, ModelParallelStrategy):
            shard(model, trainer.strategy.device_mesh["data_parallel"])
        if self.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        if self.compile_layers:
            for layer in model.model.layers:
                layer.compile()
            torch.compiler.set_stance("force_eager")  # but for training_step
        model.train()

    def autocast(self) -> AbstractContextManager:
        """The context that Lightning runs steps in; for passes outside of them."""
        return self.trainer.precision_plugin.forward_context()

    # --- steps ---------------------------------------------------------------------------------------

    @override
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        with torch.compiler.set_stance("default"):
            loss, terms = self.active.objective(batch)
        rows = len(batch["input_ids"])
        self.log("train/loss", terms["lm_loss"], prog_bar=True, sync_dist=True, batch_size=rows)
        for name, value in terms.items():
            self.log(f"{self.active.phase}/{name}", value, sync_dist=True, batch_size=rows)
        return loss

    def lm_loss(self, batch: Batch) -> Tensor:
        """Mean cross entropy of the response tokens; the mean over ranks is that of all the ranks' tokens."""
        losses_L, targets_L, _ = response_losses(self.lm, batch)
        count = all_sum((targets_L != IGNORE).sum(dtype=torch.float32)) / world_size()
        return losses_L.sum() / count.clamp(min=1.0)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        data = self.trainer.datamodule
        losses, counts = self._domain_losses(batch, data)
        total = float(counts.sum())
        mean = losses.sum() / max(1.0, total)
        for name in ("val/loss", f"{self.active.phase}/val_loss"):
            self.log(name, mean, batch_size=int(total), sync_dist=True, prog_bar=name == "val/loss")
        for d, domain in _present(counts, data):
            value = losses[d] / counts[d].clamp(min=1.0)
            self.log(f"val/loss/{domain}", value, batch_size=int(counts[d]), sync_dist=True)

    def _domain_losses(self, batch: Batch, data) -> tuple[Tensor, Tensor]:
        """Summed response loss and token count of each domain in a held-out batch."""
        losses_L, targets_L, ids_L = response_losses(self.lm, batch)
        domains_L = [data.domains.index(data.heldout_set[i]["domain"]) for i in ids_L.tolist()]
        groups_L = torch.tensor(domains_L, device=losses_L.device, dtype=torch.long)
        num_domains = len(data.domains)
        return grouped_losses(losses_L=losses_L, targets_L=targets_L, groups_L=groups_L, num_groups=num_domains)

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        data = self.trainer.datamodule
        losses, counts = self._domain_losses(batch, data)
        ids_B = batch["example_ids"][:, 0].tolist()
        rows = [data.heldout_set[max(0, i)] for i in ids_B]
        prompts = [row["input_ids"][: row["prompt_length"]] for row in rows]
        budgets = [self.active.max_new_tokens or answer_budget(row) for row in rows]
        answers = greedy_answers(self.lm, data.tokenizer, prompts, max_new_tokens=budgets)
        for d, domain in _present(counts, data):
            own = [b for b, row in enumerate(rows) if ids_B[b] != PADDING and row["domain"] == domain]
            right = sum(data.verify(rows[b], answers[b]) for b in own) / max(1, len(own))
            self.log(f"test/exact_match/{domain}", right, batch_size=len(own), sync_dist=True)
            value = losses[d] / counts[d].clamp(min=1.0)
            self.log(f"test/loss/{domain}", value, batch_size=int(counts[d]), sync_dist=True)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        data = self.trainer.datamodule
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        budgets = [self.active.max_new_tokens or PREDICT_TOKENS] * len(prompts)
        answers = greedy_answers(self.lm, data.tokenizer, prompts, max_new_tokens=budgets)
        rows = [data.predict_set[i] for i in batch["index"].tolist()]
        return [{**row, "answer": answer} for row, answer in zip(rows, answers, strict=True)]

    def score(self, track=lambda batches: batches) -> Scores:
        """Held-out loss and exact match per domain; see :func:`upit.evaluation.evaluate`."""
        data = self.trainer.datamodule
        return evaluate(
            self.lm,
            data.tokenizer,
            data.heldout_set,
            data.verify,
            max_new_tokens=self.active.max_new_tokens,
            max_tokens=data.eval_batch_tokens,
            autocast=self.autocast,
            track=track,
        )

    # --- optimisation --------------------------------------------------------------------------------

    def steps_per_epoch(self) -> int:
        """Optimizer steps of one epoch.

        Not ``trainer.estimated_stepping_batches``: that sets up the loader before a checkpoint's loops are
        restored, and a mid-epoch resume would then start the epoch's data anew (seen with lightning 2.6.6).
        """
        return math.ceil(self.batches_per_epoch() / self.trainer.accumulate_grad_batches)

    def batches_per_epoch(self) -> int:
        """Training batches of one epoch on this rank."""
        batches = len(self.trainer.datamodule.train_dataloader())
        limit = self.trainer.limit_train_batches
        return min(batches, limit) if isinstance(limit, int) else int(batches * limit)

    def total_steps(self) -> int:
        """Optimizer steps of the whole fit.

        Raises: ValueError: neither max_epochs nor max_steps bounds the fit.
        """
        epochs, steps = self.trainer.max_epochs, self.trainer.max_steps
        if epochs in (None, -1) and steps == -1:
            raise ValueError("set trainer.max_epochs or trainer.max_steps: the schedule needs a horizon")
        by_epochs = math.inf if epochs in (None, -1) else self.steps_per_epoch() * epochs
        return int(min(by_epochs, math.inf if steps == -1 else steps))

    def phase_steps(self) -> int:
        """Optimizer steps of the active phase: the horizon of its learning-rate schedule."""
        return self.total_steps()

    @override
    def configure_optimizers(self) -> Any:
        return self.active.optimizers_for(self.phase_steps())

    def optimizers_for(self, steps: int) -> dict[str, Any]:
        """AdamW and a schedule with a horizon of ``steps``."""
        params = [p for p in self.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in params if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, fused=params[0].is_cuda or None)
        # let Lightning unscale: under mixed precision it refuses to clip for optimizers that do it themselves
        optimizer._step_supports_amp_scaling = False
        warmup = round(self.warmup_fraction * steps)
        scheduler = get_scheduler(self.schedule, optimizer, num_warmup_steps=warmup, num_training_steps=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # --- identity in checkpoints ---------------------------------------------------------------------

    def identity(self) -> dict[str, Any]:
        """What a checkpoint says about the model; see :func:`upit.checkpoints.identity_of`."""
        return identity_of(self.lm, phase=self.active.phase, swap_step=self.swap_step)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[IDENTITY] = self.identity()

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if IDENTITY not in checkpoint:
            raise ValueError("the checkpoint does not say which model it holds: no checkpoint of a upit module")
        self.enter(checkpoint[IDENTITY])
        if self.active.model is None:
            self.active.model = build(config_of(checkpoint[IDENTITY]))
            if self._trainer is not None:
                self.active.finish(self._trainer)


def _present(counts: Tensor, data) -> list[tuple[int, str]]:
    """The domains of a batch, numbered; those of all the ranks' batches, as every rank must log the same names."""
    total = all_sum(counts.clone())
    return [(d, domain) for d, domain in enumerate(data.domains) if total[d] > 0]


def mask_of(batch: Batch) -> Tensor:
    """True for real tokens, flattened."""
    return (batch["example_ids"] != PADDING).flatten()
