"""CUDA graphs of a training step's decoder body: the host launches two graphs, not thousands of kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from upit.core.batches import Batch
from upit.model.experts.dispatch import launched_by_graphs
from upit.model.families import MOE_TYPES
from upit.model.forward import attention_mask, body_states
from upit.model.routers import moe_routers

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SPARE = 2  # times the sequences of the batch that is captured fit into the graphs; ours
WARM_UP = 3  # passes before the capture, which compile, and initialise libraries
# the capture is not ended by what other threads do, such as the loader's, which pins memory
CAPTURE: dict[str, Any] = {"capture_error_mode": "thread_local"}


class _Graphs:
    """A function of tensors, its forward and its backward pass captured.

    As ``torch.cuda.make_graphed_callables``, but for two things: nothing of the captured passes' autograd graph stays,
    whose nodes would tie the parameters to the stream of the capture; and gradients of an earlier batch are kept.

    Args:
        function: captured with ``inputs``, which need no gradients.
        params: what it needs gradients of.
    """

    def __init__(self, function: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], params: list[Tensor]):
        self.inputs, self.params = [tensor.clone() for tensor in inputs], params
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(WARM_UP):
                outputs = function(*self.inputs)
                self._grads_of(outputs, [torch.zeros_like(output) for output in outputs])
                del outputs
        torch.cuda.synchronize()
        # each with memory of its own: in the other's, a forward pass would write over an earlier batch's gradients
        with torch.cuda.graph(self._forward, **CAPTURE):
            outputs = function(*self.inputs)
        self.grad_outputs = [torch.empty_like(output) for output in outputs]
        with torch.cuda.graph(self._backward, **CAPTURE):
            self.grads = self._grads_of(outputs, self.grad_outputs)
        self.outputs = [output.detach() for output in outputs]

    def _grads_of(self, outputs: Sequence[Tensor], grad_outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        pairs = [pair for pair in zip(outputs, grad_outputs, strict=True) if pair[0].requires_grad]
        return torch.autograd.grad([output for output, _ in pairs], self.params, [grad for _, grad in pairs])

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return _Replay.apply(self, inputs, *self.params)

    def forward(self, inputs: Sequence[Tensor]) -> None:
        """Leaves its results in ``outputs``."""
        for held, given in zip(self.inputs, inputs, strict=True):
            held.copy_(given)
        self._forward.replay()

    def backward(self, grad_outputs: Sequence[Tensor]) -> None:
        """Leaves its results in ``grads``."""
        for param, grad in zip(self.params, self.grads, strict=True):
            # of an earlier batch of the same step, where this pass writes
            if param.grad is not None and param.grad.data_ptr() == grad.data_ptr():
                param.grad = param.grad.clone()
        for held, given in zip(self.grad_outputs, grad_outputs, strict=True):
            if held.is_floating_point():
                held.copy_(given)
        self._backward.replay()


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, graphs: _Graphs, inputs: Sequence[Tensor], *params: Tensor) -> tuple[Tensor, ...]:
        ctx.graphs = graphs
        graphs.forward(inputs)
        outputs = tuple(output.detach() for output in graphs.outputs)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx, *grad_outputs: Tensor):
        ctx.graphs.backward(grad_outputs)
        return None, None, *(grad.detach() for grad in ctx.graphs.grads)


def check_capturable(precision: str) -> None:
    """Raises: ValueError: experts in this precision, or on this GPU, run on sizes that the host must know."""
    if precision.startswith(("32", "64")):
        raise ValueError(
            f"cuda_graphs=True of a MoE needs half precision, such as trainer.precision=bf16-mixed, not {precision!r}"
        )
    if torch.cuda.get_device_capability() < (9, 0):
        raise ValueError(
            f"cuda_graphs=True of a MoE needs a Hopper GPU or a newer one, not a {torch.cuda.get_device_name()}; "
            "leave it out"
        )


class GraphedBody:
    """:func:`upit.model.forward.body_states` for training steps, by CUDA graphs.

    They are captured at the first batch, which takes three passes more; from then on the memory of a pass is theirs,
    and what needs a gradient is settled. A batch of another shape, of longer sequences, or of more than ``SPARE``
    times as many, goes the usual way; the first such says so.
    """

    def __init__(self) -> None:
        self._graphs: _Graphs | None = None
        self._warned = False

    def __call__(self, model: PreTrainedModel, batch: Batch) -> Tensor:
        """Final hidden states, (B, T, H); the routers' ``last_logits`` and ``last_experts`` are those of this pass.

        Raises: RuntimeError: the first pass can't be captured.
        """
        if self._graphs is None:
            try:
                self._graphs = self._capture(model, batch)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                kind = model.config.model_type
                raise RuntimeError(f"a {kind} can't be captured as CUDA graphs; set cuda_graphs=false") from error
        if not self._fits(batch):
            return body_states(model, batch)
        states_BTH, *routing = self._graphs(*self._inputs(model, batch))
        self._keep(routing)
        return states_BTH

    def _fits(self, batch: Batch) -> bool:
        shape, sequences, longest = batch["input_ids"].shape, len(batch["lengths"]), batch["longest"]
        fits = shape == self._shape and sequences <= self._sequences and longest <= self._longest
        if not (fits or self._warned):
            self._warned = True
            warnings.warn(
                f"a batch of {tuple(shape)} tokens in {sequences} sequences, the longest of {longest}, does not fit "
                f"the CUDA graphs, captured for {tuple(self._shape)}, {self._sequences} and {self._longest}; such "
                "steps are slower; if there are many, set cuda_graphs=false",
                stacklevel=2,
            )
        return fits

    def _keep(self, routing: Sequence[Tensor | None]) -> None:
        """Let the routers have what they said last, logits and experts in turns."""
        for router, logits_TE, experts_TK in zip(self._routers, routing[::2], routing[1::2], strict=True):
            router.last_logits, router.last_experts = logits_TE, experts_TK

    def _inputs(self, model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        lengths_S = F.pad(batch["lengths"], (0, self._sequences - len(batch["lengths"])))
        mask = attention_mask(model, {**batch, "lengths": lengths_S, "longest": self._longest})
        return batch["input_ids"], batch["position_ids"], mask

    def _capture(self, model: PreTrainedModel, batch: Batch) -> _Graphs:
        self._shape, self._longest = batch["input_ids"].shape, batch["longest"]
        self._sequences = SPARE * len(batch["lengths"])
        self._routers = moe_routers(model) if model.config.model_type in MOE_TYPES else []
        nothing = [None, None] * len(self._routers)  # what they said holds an autograd graph, and that a stream
        self._keep(nothing)
        body: Any = model.model

        def run(input_ids_BT: Tensor, position_ids_BT: Tensor, mask: Tensor) -> list[Tensor]:
            output = body(input_ids=input_ids_BT, position_ids=position_ids_BT, attention_mask=mask, use_cache=False)
            said = [(router.last_logits, router.last_experts) for router in self._routers]
            self._keep(nothing)  # else the next pass, on another stream, finds nodes of this one's autograd graph
            return [output.last_hidden_state, *(tensor for pair in said for tensor in pair)]

        params = [param for param in body.parameters() if param.requires_grad]
        # a cast that autocast has cached would be missing from the graphs
        autocast = torch.autocast("cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), False)
        with autocast, launched_by_graphs(model) if self._routers else nullcontext():
            return _Graphs(run, self._inputs(model, batch), params)
