"""Rotary embeddings whose frequencies stay in float32 in a model of half precision, as in stock transformers."""

from functools import partial

from torch import Tensor, nn

FREQUENCIES = "inv_freq"  # how the names of transformers' buffers end


def keep_frequencies(model: nn.Module) -> None:
    """Let no later cast of ``model``, nor of a module it is in, round its rotary frequencies.

    transformers builds and loads them in float32; ``module.to(torch.bfloat16)``, as Lightning calls it for bf16-true,
    would leave 8 bits of them. They move between devices as everything else does.
    """
    for module in model.modules():
        if any(name.endswith(FREQUENCIES) for name, _ in module.named_buffers(recurse=False)):
            module._apply = partial(_apply_keeping_dtype, module)  # type: ignore[method-assign]


def _apply_keeping_dtype(module: nn.Module, fn, recurse: bool = True) -> nn.Module:
    """``nn.Module._apply``, which every cast goes through, but tensors keep their dtype."""

    def same_dtype(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return result if result.dtype == tensor.dtype else tensor.to(result.device)

    return type(module)._apply(module, same_dtype, recurse)
