"""What a module with a causal LM does outside of training: validation, test, prediction and scores."""

import warnings
from contextlib import AbstractContextManager
from typing import Any, Literal, Self

import lightning as L
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from upit.core.batches import PADDING, Batch
from upit.core.distributed import world_size
from upit.evaluation.metrics import WeightedMeans
from upit.evaluation.scores import Scores, evaluate, summed_answers, summed_losses
from upit.model.generation import answer_column, greedy_answers

PREDICT_TOKENS = 256

# what is logged at the end of a validation is a mean over the ranks by then
warnings.filterwarnings("ignore", message=r"It is recommended to use `self\.log\(.*sync_dist=True")


class EvaluatedModule(L.LightningModule):
    """A causal LM that is scored on the data module's held-out examples.

    Args:
        max_new_tokens: longest generated answer; default by the reference's length, 256 where there is none.
    Raises: ValueError: ``max_new_tokens`` is below 1.
    """

    phase: Literal["dense", "moe"]
    heldout: WeightedMeans  # of a validation or test in progress

    def __init__(self, max_new_tokens: int | None = None) -> None:
        super().__init__()
        if max_new_tokens is not None and max_new_tokens < 1:
            raise ValueError(f"{type(self).__name__}.max_new_tokens={max_new_tokens} must be at least 1")
        self.max_new_tokens = max_new_tokens
        self.model: PreTrainedModel | None = None

    @property
    def active(self) -> Self:
        """The module whose model is in use: itself, but for the one that joins two phases."""
        return self

    @property
    def lm(self) -> PreTrainedModel:
        """The causal LM in use."""
        model = self.active.model
        if model is None:
            raise RuntimeError("the model is not built yet; it is in configure_model")
        return model

    def autocast(self) -> AbstractContextManager:
        """The context that Lightning runs steps in; for passes outside of them."""
        return self.trainer.precision_plugin.forward_context()

    def validation_metrics(self) -> set[str]:
        """Names of what a validation logs."""
        domains = self.trainer.datamodule.domains
        return {"val/loss", f"{self.phase}/val_loss", *(f"val/loss/{domain}" for domain in domains)}

    @override
    def on_validation_epoch_start(self) -> None:
        domains = self.trainer.datamodule.domains
        self.heldout = WeightedMeans(["loss", *(f"loss/{name}" for name in domains)]).to(self.device)

    @override
    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        sums_C, counts_C = summed_losses(self.lm, batch, self.trainer.datamodule)
        self.heldout.update(*(torch.cat([values_C.sum()[None], values_C]) for values_C in (sums_C, counts_C)))

    @override
    def on_validation_epoch_end(self) -> None:
        means = self.heldout.compute()
        self.log(f"{self.active.phase}/val_loss", means["loss"])
        for name, mean in means.items():
            self.log(f"val/{name}", mean, prog_bar=name == "loss")

    @override
    def on_test_epoch_start(self) -> None:
        domains = self.trainer.datamodule.domains
        names = [f"{metric}/{name}" for metric in ("loss", "exact_match") for name in domains]
        self.heldout = WeightedMeans(names).to(self.device)
        self.scored = set(self.trainer.datamodule.scored_examples())

    @override
    def test_step(self, batch: Batch, batch_idx: int) -> None:
        data = self.trainer.datamodule
        losses_2C = torch.stack(summed_losses(self.lm, batch, data))
        asked = [i for i in batch["example_ids"][:, 0].tolist() if i in self.scored]
        if self.scored and world_size() > 1:
            asked = asked or [PADDING]  # the ranks generate in step
        answers = summed_answers(self.lm, asked, data, max_new_tokens=self.active.max_new_tokens)
        self.heldout.update(*torch.cat([losses_2C, torch.stack(answers).to(losses_2C)], dim=1))

    @override
    def on_test_epoch_end(self) -> None:
        self.log_dict({f"test/{name}": mean for name, mean in self.heldout.compute().items()})

    @override
    def on_predict_epoch_start(self) -> None:
        self.answer_column = answer_column(self.trainer.datamodule.predict_set)

    @override
    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> list[dict[str, Any]]:
        data = self.trainer.datamodule
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
        ]
        budgets = [self.active.max_new_tokens or PREDICT_TOKENS] * len(prompts)
        answers = greedy_answers(self.lm, data.tokenizer, prompts, max_new_tokens=budgets)
        rows = [data.predict_set[i] for i in batch["index"].tolist()]
        return [{**row, self.answer_column: answer} for row, answer in zip(rows, answers, strict=True)]

    def score(self, track=lambda batches: batches) -> Scores:
        """Held-out loss and exact match per domain; see :func:`upit.evaluation.scores.evaluate`."""
        most = self.active.max_new_tokens
        return evaluate(self.lm, self.trainer.datamodule, max_new_tokens=most, autocast=self.autocast, track=track)
