"""The experts' forward: one grouped product over all experts, in the dtype that autocast asks for.

Shapes: ``T`` tokens, ``K`` experts a token, ``N = T * K`` assignments, ``E`` experts, ``H`` hidden, ``I`` inner.
Registered in transformers' experts interface, so any MoE with fused experts can use it:
``model.set_experts_implementation("upit_grouped")``. Two more names leave no choice of GPU kernels: ``upit_triton``,
and ``upit_quack`` for QuACK wherever it can.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from upit.core.gpu import HAS_TRITON
from upit.model.attention import HALF, compute_dtype

NAME, TRITON, QUACK = "upit_grouped", "upit_triton", "upit_quack"
QUACK_WIDTHS = range(2048, 4096)  # hidden; below, hosts take longer to launch it, above, H100s are faster in Triton
HAS_QUACK = find_spec("quack") is not None


def use(model: PreTrainedModel, name: str = NAME) -> None:
    """Let every MoE layer of ``model`` run :func:`grouped_forward`. Saved configs are left as they are."""
    model.config._experts_implementation = name


@contextmanager
def launched_by_graphs(model: PreTrainedModel) -> Iterator[None]:
    """Within, QuACK at small widths too: the host's time to launch it is spent once, when a graph is captured."""
    usual = model.config._experts_implementation
    if usual == NAME and model.config.hidden_size < QUACK_WIDTHS.stop:
        use(model, QUACK)
    try:
        yield
    finally:
        use(model, usual)


@torch.compiler.assume_constant_result
def has_quack() -> bool:
    """Whether QuACK is installed and this GPU is a Hopper, the only kind its kernels were tried on."""
    return HAS_QUACK and torch.cuda.get_device_capability()[0] == 9


def takes_quack(name: str, hidden: int, inner: int) -> bool:
    """Whether experts of these widths run QuACK's kernels under a name."""
    wanted = name == QUACK or (name == NAME and hidden in QUACK_WIDTHS)
    return wanted and hidden % 8 == 0 == inner % 8 and has_quack()


def grouped_forward(self: Any, x_TH: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, *, name: str = NAME) -> Tensor:
    """Dropless experts: sort assignments by expert, two grouped products, weighted sum per token.

    The stock grouped forward leaves fp32 weights in fp32 under autocast; this one casts them, as every
    ``nn.Linear`` does. On GPUs, SwiGLU experts in half precision run :mod:`upit.model.experts.quack_kernels` (see
    :func:`takes_quack`) or :mod:`upit.model.experts.triton_kernels`.

    Args:
        self: module with ``gate_up_proj`` (E, 2I, H), ``down_proj`` (E, H, I) and ``act_fn``.
        x_TH: hidden states.
        expert_ids_TK, weights_TK: the router's choice and its weights.
        name: which kernels, by the names above.
    Returns: (T, H), dtype of ``x_TH``.
    """
    dtype = compute_dtype(x_TH)
    if not (x_TH.is_cuda and HAS_TRITON and dtype in HALF and isinstance(self.act_fn, nn.SiLU | SiLUActivation)):
        halves = self.gate_up_proj.to(dtype), self.down_proj.to(dtype)
        out_TH = plain_experts(x_TH.to(dtype), *halves, expert_ids_TK, weights_TK, act_fn=self.act_fn)
        return out_TH.to(x_TH.dtype)
    if takes_quack(name, *self.down_proj.shape[1:]):
        from upit.model.experts.quack_kernels import experts
    else:
        from upit.model.experts.triton_kernels import experts
    return experts(x_TH.to(dtype), self.gate_up_proj, self.down_proj, expert_ids_TK, weights_TK).to(x_TH.dtype)


@torch.compiler.disable  # grouped products of float32 can't be traced
def plain_experts(
    x_TH: Tensor, gate_up_EJH: Tensor, down_EHI: Tensor, expert_ids_TK: Tensor, weights_TK: Tensor, *, act_fn
) -> Tensor:
    """The same in plain torch: any device, dtype and activation; the kernels' reference."""
    num_tokens, top_k = expert_ids_TK.shape
    expert_ids_N = expert_ids_TK.reshape(-1)
    order_N = torch.argsort(expert_ids_N, stable=True)
    counts_E = torch.zeros(len(gate_up_EJH), dtype=torch.int64, device=x_TH.device)
    counts_E.scatter_add_(0, expert_ids_N, torch.ones_like(expert_ids_N))
    ends_E = counts_E.cumsum(0).to(torch.int32)

    gate_up_NJ = F.grouped_mm(x_TH[order_N // top_k], gate_up_EJH.transpose(1, 2), offs=ends_E)
    gate_NI, up_NI = gate_up_NJ.chunk(2, dim=-1)
    out_NH = F.grouped_mm(act_fn(gate_NI) * up_NI, down_EHI.transpose(1, 2), offs=ends_E)

    unsorted_NH = torch.empty_like(out_NH).index_copy(0, order_N, out_NH)
    weighted = unsorted_NH.view(num_tokens, top_k, -1) * weights_TK.unsqueeze(-1)
    return weighted.sum(dim=1)


for each in (NAME, TRITON, QUACK):
    ALL_EXPERTS_FUNCTIONS.register(each, partial(grouped_forward, name=each))
