"""Checks of what the choices of the method return: shape, dtype, range and finiteness. Errors name the class.

``D`` layers, ``E`` or ``N`` experts, ``H`` hidden, ``S`` seed examples, ``M`` experts so far.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from upit.core.choice import Strategy

if TYPE_CHECKING:
    from upit.preparation.expert import Expert


def checked_rows(owner: Strategy, rows_DEH: Any, shape: tuple[int, int, int]) -> Tensor:
    """Rows of the routers of all layers, in float32 on the CPU.

    Args:
        shape: (layers, experts, hidden), exactly; nothing is broadcast.
    Raises: ValueError: not floats of this shape, or NaN or infinity in a layer.
    """
    _check_tensor(owner, "rows of the router", rows_DEH, shape, "(layers, experts, hidden)")
    broken = [layer for layer, rows_EH in enumerate(rows_DEH) if not rows_EH.isfinite().all()]
    if broken:
        raise ValueError(f"{owner.class_path} returned rows of the router with NaN or infinity in layers {broken}")
    return rows_DEH.detach().float().cpu()


def checked_initialisation(owner: Strategy, result: Any, config: Any, count: int) -> tuple[list["Expert"], Tensor]:
    """Experts and rows of the routers, as a router initialisation returns them.

    Args:
        config: the dense model's.
        count: experts it was given.
    Raises: ValueError: another number of experts, or as :func:`checked_rows`.
    """
    if not isinstance(result, tuple) or len(result) != 2:
        raise ValueError(f"{owner.class_path} returned {type(result).__name__}, expected (experts, router_DEH)")
    experts, rows_DEH = result
    if len(experts) != count:
        raise ValueError(f"{owner.class_path} returned {len(experts)} experts, it was given {count}")
    return list(experts), checked_rows(owner, rows_DEH, (config.num_hidden_layers, count, config.hidden_size))


def checked_assignment(owner: Strategy, expert_S: Any, num_seeds: int, num_experts: int) -> Tensor:
    """The expert of each seed example, (S,) int64 on the CPU.

    Raises: ValueError: not one integer an example, or an expert that does not exist.
    """
    found = tuple(expert_S.shape) if isinstance(expert_S, Tensor) else type(expert_S).__name__
    if found != (num_seeds,):
        raise ValueError(f"{owner.class_path} returned {found}, expected a tensor of shape ({num_seeds},)")
    if expert_S.is_floating_point() or expert_S.is_complex() or expert_S.dtype == torch.bool:
        raise ValueError(f"{owner.class_path} returned {expert_S.dtype}, expected integers, one an example")
    outside = sorted({expert for expert in expert_S.tolist() if not 0 <= expert < num_experts})
    if outside:
        raise ValueError(
            f"{owner.class_path} assigned examples to experts {outside}, there are 0 to {num_experts - 1}"
        )
    return expert_S.long().cpu()


def checked_pair(owner: Strategy, pair: Any, num_experts: int) -> tuple[int, int]:
    """Positions of two parents.

    Raises: ValueError: not two different positions of the pool.
    """
    found = [int(i) for i in pair] if isinstance(pair, Sequence) else []
    if len(set(found)) != 2 or len(found) != 2 or not all(0 <= i < num_experts for i in found):
        raise ValueError(
            f"{owner.class_path} chose the parents {pair!r}, expected two different experts of 0 to {num_experts - 1}"
        )
    return found[0], found[1]


def checked_selection(owner: Strategy, chosen: Any, available: int, num_experts: int) -> list[int]:
    """Positions of the experts that are kept.

    Raises: ValueError: not ``num_experts`` different positions of the pool.
    """
    found = [int(i) for i in chosen]
    if len(set(found)) != num_experts or len(found) != num_experts or not all(0 <= i < available for i in found):
        raise ValueError(
            f"{owner.class_path} selected {found}, expected {num_experts} different experts of 0 to {available - 1}"
        )
    return found


def checked_products(owner: Strategy, products: Any, shape: tuple[int, int]) -> Tensor:
    """Inner products of new experts with all. Raises: ValueError: another shape, or not finite."""
    _check_tensor(owner, "inner products", products, shape, "(new experts, experts)")
    if not products.isfinite().all():
        raise ValueError(f"{owner.class_path} returned inner products with NaN or infinity: {products.tolist()}")
    return products


def checked_similarity(owner: Strategy, matrix: Any, num_experts: int) -> Tensor:
    """Similarities of all experts. Raises: ValueError: not square, not finite, or not symmetric."""
    _check_tensor(owner, "similarities", matrix, (num_experts, num_experts), "(experts, experts)")
    if not matrix.isfinite().all():
        raise ValueError(f"{owner.class_path} returned similarities with NaN or infinity: {matrix.tolist()}")
    if not torch.allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5 * max(1.0, float(matrix.abs().max()))):
        raise ValueError(f"{owner.class_path} returned similarities that are not symmetric: {matrix.tolist()}")
    return matrix


def checked_child(owner: Strategy, child: Any, name: str, like: tuple[torch.dtype, tuple[int, ...]], device) -> Tensor:
    """One tensor of a merged expert; that it is finite is checked where it is written.

    Args:
        name: the tensor's.
        like: dtype and shape of the first parent's.
    Raises: ValueError: another dtype, shape or device.
    """
    dtype, shape = like
    _check_tensor(owner, f"for tensor {name!r} a tensor", child, shape, "as the parents'")
    if child.dtype != dtype or child.device != device:
        raise ValueError(
            f"{owner.class_path} returned for tensor {name!r} {child.dtype} on {child.device}, expected {dtype} on "
            f"{device}, as of the first parent"
        )
    return child


def checked_pool(owner: Strategy, experts: Any, count: int, shapes: Mapping[str, tuple[int, ...]]) -> list["Expert"]:
    """The experts that a source gives.

    Args:
        count: what its ``count()`` announced.
        shapes: of the base's tensors.
    Raises: ValueError: another number, or an expert with other tensors.
    """
    if len(experts) != count:
        raise ValueError(f"{owner.class_path} gave {len(experts)} experts, its count() announced {count}")
    for i, expert in enumerate(experts):
        own = expert.shapes
        wrong = [name for name in sorted(own.keys() | shapes.keys()) if own.get(name) != shapes.get(name)]
        if wrong:
            raise ValueError(
                f"{owner.class_path}: tensor {wrong[0]!r} of expert {i} ({str(expert.file)!r}) has shape "
                f"{own.get(wrong[0])}, the base's has {shapes.get(wrong[0])}"
            )
    return list(experts)


def _check_tensor(owner: Strategy, what: str, value: Any, shape: tuple[int, ...], axes: str) -> None:
    """Raises: ValueError: not a tensor of floats, or of another shape."""
    if not isinstance(value, Tensor) or value.is_meta:
        kind = "a tensor without data" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"{owner.class_path} returned {kind}, expected {what} of shape {shape} {axes}")
    if tuple(value.shape) != shape:
        raise ValueError(f"{owner.class_path} returned {what} of shape {tuple(value.shape)}, expected {shape} {axes}")
    if not value.is_floating_point():
        raise ValueError(f"{owner.class_path} returned {what} of {value.dtype}, expected floating point")
