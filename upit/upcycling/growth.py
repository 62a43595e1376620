"""More experts later: from N trained experts of a MoE to M, none of them lost (ours; the paper upcycles once).

``D`` layers, ``N`` experts before, ``M`` after, ``H`` hidden.
"""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from upit.core.choice import Strategy
from upit.core.progress import Track, untracked
from upit.core.tensors import full
from upit.expansion.merging import linear
from upit.model.families import FUSED, expert_name, within_layer
from upit.model.routers import moe_routers
from upit.preparation.expert import Expert
from upit.preparation.placement import write_gathered
from upit.router_init import RandomRouter

Lineage = Sequence[Mapping[str, Any]]
PLACE = ("expert", "file", "sha256")  # of a lineage's entry: which expert and where, not where from


def trained_experts(
    moe: PreTrainedModel, lineage: Lineage, directory: Path, *, step: int, epoch: float, track: Track = untracked
) -> list[Expert]:
    """Write the experts of a MoE as post-training left them; a collective, one parameter at a time.

    Args:
        lineage: where each came from when the MoE was made; goes on in theirs, with ``trained_to``.
        directory: for ``trained_NN.safetensors``.
        step, epoch: now.
        track: wraps the experts, for a progress bar.
    """
    experts = []
    dtype = str(moe.dtype).removeprefix("torch.")
    for e, entry in enumerate(track(lineage)):
        path = directory / f"trained_{e:02d}.safetensors"
        origin = {key: value for key, value in entry.items() if key not in PLACE} | {"trained_to": step}
        sha256 = write_gathered(path, _ffn(moe, e), _specs(moe))
        experts.append(Expert(path, sha256, dtype, step=step, epoch=epoch, origin=origin))
    return experts


def _ffn(moe: PreTrainedModel, expert: int) -> Iterator[tuple[str, Tensor]]:
    """One expert's tensors, named as in the dense state dict; a collective."""
    for name, param in moe.named_parameters():
        layer, part = within_layer(name)
        if part in FUSED:
            parts = full(param)[expert].chunk(len(FUSED[part]))
            yield from zip([expert_name(layer, projection) for projection in FUSED[part]], parts, strict=True)


def _specs(moe: PreTrainedModel) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of :func:`_ffn`'s tensors, without gathering them."""
    specs: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    for name, param in moe.named_parameters():
        layer, part = within_layer(name)
        if part in FUSED:
            _, rows, columns = param.shape
            shape = (rows // len(FUSED[part]), columns)
            specs |= {expert_name(layer, projection): (param.dtype, shape) for projection in FUSED[part]}
    return specs


def router_of(moe: PreTrainedModel) -> Tensor:
    """Routers of a MoE, ``router_DNH`` in float32 on the CPU; a collective."""
    return torch.stack([full(router.weight).float().cpu() for router in moe_routers(moe)])


class NewRows(Strategy):
    """The router's rows of experts that join a trained MoE."""

    @abstractmethod
    def __call__(self, router_DNH: Tensor, lineage: Lineage, config: PretrainedConfig, *, seed: int = 0) -> Tensor:
        """Rows of the new experts alone, (D, M - N, H) float32.

        Args:
            router_DNH: rows of the trained experts, which stay as they are.
            lineage: of all M experts, the trained ones first; see :mod:`upit.expansion.expand`.
            config: the MoE's.
        """


class MergedRows(NewRows):
    """The parents' rows, merged by the alpha and beta of their child; default ours.

    A child's logit then lies between those of its parents. So no token changes its first expert, and whoever comes
    second anew is a descendant of the first: post-training starts from a MoE that routes almost as before. For the
    same reason some children get no token at first (docs/results.md).
    """

    def __call__(self, router_DNH, lineage, config, *, seed=0):
        rows = list(router_DNH.unbind(1))
        for entry in lineage[len(rows) :]:
            j, k = entry["parents"]
            rows.append(linear([rows[j], rows[k]], [entry["alpha"], entry["beta"]]))
        return torch.stack(rows[router_DNH.shape[1] :], dim=1)


class RandomRows(NewRows):
    """Stock transformers' own, as :class:`upit.router_init.RandomRouter`: the control."""

    def __call__(self, router_DNH, lineage, config, *, seed=0):
        return RandomRouter().weights(config, len(lineage) - router_DNH.shape[1], seed=seed)
