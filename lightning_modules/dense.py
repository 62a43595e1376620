"""Instruction tuning of a dense model."""

from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel
from typing_extensions import override

from lightning_modules.base import CausalLMModule
from upit.core.batches import Batch
from upit.core.distributed import broadcast
from upit.evaluation.metrics import WeightedMeans
from upit.model.loading.build import check_tokenizer, from_scratch, load_pretrained, read_config, scratch_config


class DenseModule(CausalLMModule):
    """Full fine-tuning of a dense causal LM; the loss is on the response tokens only.

    Args:
        model: a local directory, a hub id, a ``.gguf`` file or ``package://NAME/FILE.gguf``; None to train from
            scratch.
        config: fields of ``LlamaConfig`` for a model from scratch (its vocabulary is the tokenizer's). One
            ``seed_everything`` gives the same weights on every device and in any number of processes.
    Raises: ValueError: not exactly one of ``model`` and ``config`` is given.
    """

    phase = "dense"

    def __init__(self, model: str | None = None, config: dict[str, Any] | None = None, **kwargs) -> None:
        super().__init__(**kwargs)
        if (model is None) == (config is None):
            raise ValueError(f"give one of model and config: got model={model!r}, config={config!r}")
        self.source = model
        self.config = config
        self.means = WeightedMeans(["lm_loss"])

    def architecture(self) -> PretrainedConfig:
        """Config of the model that it starts from, known before that is built."""
        if self.config is not None:
            return scratch_config(self.config, self.trainer.datamodule.tokenizer)
        return read_config(str(self.source), trust_remote_code=self.trust_remote_code)

    @override
    def load(self) -> PreTrainedModel:
        if self.config is not None:
            # the run's seed, whatever was drawn since
            return from_scratch(self.architecture(), seed=broadcast(torch.initial_seed()))
        model = load_pretrained(str(self.source), trust_remote_code=self.trust_remote_code)
        check_tokenizer(model.config, self.trainer.datamodule.tokenizer, source=str(self.source))
        return model

    @override
    def objective(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        loss, response_tokens = self.lm_loss(batch)
        return loss, {"lm_loss": loss.detach()}, response_tokens
