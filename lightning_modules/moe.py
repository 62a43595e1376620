"""Post-training of a Mixture-of-Experts."""

import torch
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_modules.base import CausalLMModule
from upit.core.batches import Batch, token_mask
from upit.core.distributed import all_sum, world_size
from upit.evaluation.metrics import WeightedMeans
from upit.model.families import check_top_k
from upit.model.loading.build import check_tokenizer, load_pretrained
from upit.model.losses import load_balancing_loss, router_z_loss
from upit.model.routers import last_routing


class MoEModule(CausalLMModule):
    """Language-modelling loss plus losses that keep the router in balance (arXiv:2410.01610, stage 4).

    Padding counts for none of them. Under gradient accumulation the language-modelling loss of an optimizer step is
    the mean over all its response tokens. The balance and z losses are those of each micro-batch, weighted by its
    response tokens (ours): a larger micro-batch is balanced over more tokens.

    Balancing without a loss, by a bias on each expert's score (arXiv:2408.15664), is not offered: the routers of the
    MoE families in stock transformers that a dense model upcycles to have no such bias, so no export could hold it.

    Args:
        model: an exported MoE to start from; None inside :class:`UpITModule`, which upcycles one.
        num_experts: experts a layer, of the MoE that is upcycled; default ours. With ``model``, its own count stands.
        top_k: experts a token, of the MoE that is upcycled; 2 is the paper's. With ``model``, its own number stands.
        load_balancing_weight: of :func:`upit.model.losses.load_balancing_loss`; ours, not the paper's; 0 turns it off.
        router_z_loss_weight: of :func:`upit.model.losses.router_z_loss`, which keeps router logits small; 0.001 is
            ST-MoE's.
    """

    phase = "moe"

    def __init__(
        self,
        model: str | None = None,
        num_experts: int = 8,
        top_k: int = 2,
        load_balancing_weight: float = 0.01,
        router_z_loss_weight: float = 0.0,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        check_top_k(num_experts, top_k)
        weights = {"load_balancing_weight": load_balancing_weight, "router_z_loss_weight": router_z_loss_weight}
        for field, value in weights.items():
            if value < 0:
                raise ValueError(f"{field}={value} must not be negative; 0 turns it off")
        self.source = model
        self.num_experts = num_experts
        self.top_k = top_k
        self.load_balancing_weight = load_balancing_weight
        self.router_z_loss_weight = router_z_loss_weight
        terms = ["lm_loss", "load_balancing_loss", *(["router_z_loss"] if router_z_loss_weight else [])]
        self.means = WeightedMeans(terms)

    @override
    def load(self) -> PreTrainedModel:
        if self.source is None:
            raise ValueError("MoEModule has model=None: name an exported MoE, or upcycle one with UpITModule")
        model = load_pretrained(self.source, moe=True, trust_remote_code=self.trust_remote_code)
        check_tokenizer(model.config, self.trainer.datamodule.tokenizer, source=self.source)
        return model

    @override
    def objective(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        lm_loss, response_tokens = self.lm_loss(batch)
        router_logits_DTE, expert_ids_DTK = last_routing(self.lm)
        mask_T = token_mask(batch)
        balance = load_balancing_loss(
            router_logits_DTE=router_logits_DTE,
            expert_ids_DTK=expert_ids_DTK,
            mask_T=mask_T,
            reduce_counts=all_sum,
            world_size=world_size(),
        )
        terms = {"lm_loss": lm_loss.detach(), "load_balancing_loss": balance.detach()}
        loss = lm_loss + self.load_balancing_weight * balance
        if self.router_z_loss_weight:
            tokens = all_sum(mask_T.sum(dtype=torch.float32)).clamp(min=1.0) / world_size()
            z_loss = router_z_loss(router_logits_DTE=router_logits_DTE, mask_T=mask_T, tokens=tokens)
            terms["router_z_loss"] = z_loss.detach()
            loss = loss + self.router_z_loss_weight * z_loss
        return loss, terms, response_tokens
