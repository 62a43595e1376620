"""Borrow the dense model: experts stand in it for a while, and it is restored afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from upit.core.distributed import broadcast, rank
from upit.core.prefetch import ahead
from upit.core.tensor_files import Specs
from upit.core.tensors import full, local, local_slices, with_local
from upit.model.families import is_expert, within_layer
from upit.preparation.expert import READERS, Expert
from upit.preparation.pool import record, write_expert

if TYPE_CHECKING:
    from transformers import PreTrainedModel


STAGED_BYTES = 2**30  # of the tensors of experts that wait on a GPU to be copied into the model; ours

_loans: WeakKeyDictionary[PreTrainedModel, Loan] = WeakKeyDictionary()


@contextmanager
def borrowed(dense: PreTrainedModel, *, keep: Callable[[str], bool] = is_expert) -> Iterator[Loan]:
    """Within, a dense model is in evaluation mode and the parameters that are kept may be overwritten.

    They are copied to the host's memory first, each rank its own shard, and restored bit for bit on every exit, unless
    :meth:`Loan.forfeit` was called. So are the training modes, ``requires_grad`` and torch's random state. Gradients
    are dropped: the model must stand between two optimizer steps. Meanwhile ``state_dict()`` gives the kept
    parameters, so a checkpoint written at any moment holds the dense model.

    Within a loan of the same model, this one changes nothing: the outer loan restores the model.

    Args:
        keep: whether a parameter of this name is kept; default the experts' (the FFN).
    """
    if dense in _loans:
        yield _loans[dense]
        return
    loan = _loans[dense] = Loan(dense, keep)
    try:
        dense.eval()
        yield loan
    finally:
        loan.end()
        del _loans[dense]


class Loan:
    """What a borrowed model was before; see :func:`borrowed`."""

    def __init__(self, dense: PreTrainedModel, keep: Callable[[str], bool]) -> None:
        self._dense = dense
        params = _parameters(dense)
        copies: dict[int, Tensor] = {}  # by parameter: tied ones have several names
        self._kept: dict[str, Tensor] = {}
        for name, param in params.items():
            if keep(name):
                if id(param) not in copies:
                    copies[id(param)] = local(param.detach()).to("cpu", copy=True)
                self._kept[name] = copies[id(param)]
        self._trainable = {name: param.requires_grad for name, param in params.items()}
        self._modes = [(module, module.training) for module in dense.modules()]
        self._random = torch.get_rng_state()
        self._cuda_random = torch.cuda.get_rng_state(dense.device) if dense.device.type == "cuda" else None
        self._hook = dense.register_state_dict_post_hook(partial(self._show_kept))  # a method takes no mark
        self._forfeited = False

    def forfeit(self) -> None:
        """The model is not needed any more: it stays as it is, and the copies are freed."""
        self._hook.remove()
        self._kept, self._forfeited = {}, True

    @torch.no_grad()
    def end(self) -> None:
        """Restore the model."""
        if self._forfeited:
            return
        params = _parameters(self._dense)
        for name, copy in self._kept.items():
            local(params[name].detach()).copy_(copy)
        for name, trainable in self._trainable.items():
            params[name].requires_grad_(trainable)
        for module, mode in self._modes:
            module.training = mode
        self._dense.zero_grad()
        torch.set_rng_state(self._random)
        if self._cuda_random is not None:
            torch.cuda.set_rng_state(self._cuda_random, self._dense.device)
        self._hook.remove()  # last: a checkpoint is right even if this is interrupted

    def _show_kept(self, module, state_dict: dict[str, Tensor], prefix: str, local_metadata) -> None:
        for name, copy in self._kept.items():
            if not isinstance(state_dict[prefix + name], nn.Parameter):  # else asked for by keep_vars
                state_dict[prefix + name] = with_local(state_dict[prefix + name], copy)


def _parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """By all their names; a state dict shards again what FSDP2 left whole, whatever pass was interrupted."""
    state = model.state_dict(keep_vars=True)
    return {name: param for name, param in state.items() if isinstance(param, nn.Parameter)}


def load_experts(dense: PreTrainedModel, experts: Sequence[Expert]) -> Iterator[Expert]:
    """Copy one expert's FFN weights after the other into a borrowed model, each rank its own shard; yields it then.

    On a GPU, up to ``STAGED_BYTES`` of the next are read while the caller works with this one, or a few layers where
    those are larger.
    """
    params = {name: param for name, param in dense.named_parameters() if is_expert(name)}
    layers = [list(names) for _, names in itertools.groupby(sorted(params), key=lambda name: within_layer(name)[0])]
    device = local(params[layers[0][0]]).device
    largest = max(sum(local(params[name]).nbytes for name in names) for names in layers)
    waiting = max(1, STAGED_BYTES // largest - READERS) if device.type == "cuda" else 1

    def layer_of(place: tuple[Expert, list[str]]) -> dict[str, Tensor]:
        expert, names = place
        if any(local(params[name]) is not params[name] for name in names):
            return {name: expert.get_slice(name, device)[local_slices(params[name])] for name in names}
        return expert.tensors.read_all(names, device=device)

    parts = ahead(layer_of, itertools.product(experts, layers), workers=READERS, waiting=waiting)
    for expert in experts:
        with torch.no_grad():
            for _, tensors in zip(layers, parts, strict=False):
                for name, tensor in tensors.items():
                    local(params[name]).copy_(tensor)
        yield expert


def write_ffn(dense: PreTrainedModel, path: Path, key: str | None = None) -> str:
    """Write the FFN that stands in a dense model as an expert's file; a collective, one tensor at a time.

    Args:
        key: fingerprint of all that it depends on, kept beside the file where it may be used again.
    Returns: the file's sha256, on every rank.
    """
    params = {name: param for name, param in dense.named_parameters() if is_expert(name)}
    specs = {name: (param.dtype, tuple(param.shape)) for name, param in params.items()}
    return write_gathered(path, ((name, full(param)) for name, param in params.items()), specs, key)


def write_gathered(path: Path, tensors: Iterable[tuple[str, Tensor]], specs: Specs, key: str | None = None) -> str:
    """:func:`upit.preparation.pool.write_expert` of tensors that all ranks gather one by one, and rank 0 writes; a
    collective.

    Args:
        key: fingerprint to record beside the file, where it may be used again.
    Returns: the file's sha256, on every rank.
    """
    whole = ((name, tensor.cpu()) for name, tensor in tensors)
    if rank() > 0:
        for _ in whole:
            pass
        return str(broadcast(None))
    sha256 = write_expert(path, whole, specs)
    return str(broadcast(record(path, key, sha256) if key else sha256))
