"""Rotary embeddings whose frequencies stay in float32 in a model of half precision, as in stock transformers."""

from functools import cache
from typing import Any

from torch import Tensor, nn

FREQUENCIES = "inv_freq"  # how the names of transformers' buffers end


def keep_frequencies(model: nn.Module) -> None:
    """Let no later cast of ``model``, nor of a module it is in, round its rotary frequencies.

    transformers builds and loads them in float32; ``module.to(torch.bfloat16)``, as Lightning calls it for bf16-true,
    would leave 8 bits of them. They move between devices as everything else does.
    """
    for module in model.modules():
        if any(name.endswith(FREQUENCIES) for name, _ in module.named_buffers(recurse=False)):
            kind: Any = type(module)
            module.__class__ = _kept(kind)


class _KeepsDtype(nn.Module):
    def _apply(self, fn, recurse=True):
        def same_dtype(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(same_dtype, recurse)


@cache
def _kept(kind: Any) -> type:
    """The same kind of module with another ``_apply``, which is what every cast goes through."""
    return kind if issubclass(kind, _KeepsDtype) else type(kind.__name__, (_KeepsDtype, kind), {})
