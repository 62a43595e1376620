"""The six products of an experts layer, forward and backward: torch's and QuACK's grouped ones beside cuBLAS's.

    python -m benchmarks.grouped_products [--shape 576x1536x8] [--tokens 16384] [--load even|uneven]

Medians of CUDA events, bf16, top-2. The load is even, or uneven as in a run: each expert has 0.8 of the next heavier's
rows, in a mixed order. cuBLAS takes all rows with one expert's weights, like a dense FFN.
QuACK's column (where QuACK runs) is the calls of ``upit.model.experts.quack_kernels``: in it the first and third have
SwiGLU and its gradients inside, and the first, third, fourth and sixth gather their tokens' rows.
"""

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from triton.testing import do_bench

from upit.model.experts.dispatch import has_quack

TOP_K = 2


def products(hidden: int, inner: int, experts: int, tokens: int) -> dict[str, tuple]:
    """(left, right, grouped left, grouped right, FLOPs) of each product."""
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    rows = tokens * TOP_K
    x_NH, grad_NH = torch.randn(rows, hidden, **make), torch.randn(rows, hidden, **make)
    hidden_NI, grad_NJ = torch.randn(rows, inner, **make), torch.randn(rows, 2 * inner, **make)
    up_EJH, down_EHI = torch.randn(experts, 2 * inner, hidden, **make), torch.randn(experts, hidden, inner, **make)
    flops = 2 * rows * hidden * inner
    return {
        "gate and up": (x_NH, up_EJH[0].t(), x_NH, up_EJH.transpose(1, 2), 2 * flops),
        "down": (hidden_NI, down_EHI[0].t(), hidden_NI, down_EHI.transpose(1, 2), flops),
        "down, gradient of its input": (grad_NH, down_EHI[0], grad_NH, down_EHI, flops),
        "down, gradient of its weights": (grad_NH.t(), hidden_NI, grad_NH.t(), hidden_NI, flops),
        "gate and up, gradient of its input": (grad_NJ, up_EJH[0], grad_NJ, up_EJH, 2 * flops),
        "gate and up, gradient of its weights": (grad_NJ.t(), x_NH, grad_NJ.t(), x_NH, 2 * flops),
    }


def quack_products(hidden: int, inner: int, experts: int, tokens: int, ends_E: torch.Tensor) -> list[Callable]:
    """In the order of :func:`products`."""
    from upit.model.experts import quack_kernels as hopper

    make = {"dtype": torch.bfloat16, "device": "cuda"}
    rows = tokens * TOP_K
    x_TH, grad_TH = torch.randn(tokens, hidden, **make), torch.randn(tokens, hidden, **make)
    up_EJH, down_EHI = torch.randn(experts, 2 * inner, hidden, **make), torch.randn(experts, hidden, inner, **make)
    sizes = ends_E.diff(prepend=ends_E.new_zeros(1)).tolist()
    tokens_N = torch.cat([torch.randint(tokens, (size,), device="cuda").sort().values for size in sizes]).int()
    weights_N, bounds_F = torch.rand(rows, device="cuda"), F.pad(ends_E, (1, 0))
    up_NJ, hidden_NI = hopper.gate_and_up(x_TH, up_EJH, tokens_N, bounds_F)
    return [
        lambda: hopper.gate_and_up(x_TH, up_EJH, tokens_N, bounds_F),
        lambda: hopper.down(hidden_NI, down_EHI, bounds_F),
        lambda: hopper.down_input_gradient(grad_TH, down_EHI, up_NJ, weights_N, tokens_N, bounds_F),
        lambda: hopper.down_weight_gradient(grad_TH, hidden_NI, tokens_N, bounds_F, torch.bfloat16),
        lambda: hopper.gate_and_up_input_gradient(up_NJ, up_EJH, bounds_F),
        lambda: hopper.gate_and_up_weight_gradient(x_TH, up_NJ, tokens_N, bounds_F, torch.bfloat16),
    ]


def ends_of(load: str, experts: int, rows: int) -> torch.Tensor:
    """Where each expert's rows end, int32 (E,)."""
    shares_E = torch.ones(experts, dtype=torch.float64)
    if load == "uneven":
        order = torch.randperm(experts, generator=torch.Generator().manual_seed(0))
        shares_E = 0.8 ** order.to(torch.float64)
    return (rows * shares_E.cumsum(0) / shares_E.sum()).round().to("cuda", torch.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="576x1536x8", help="HIDDENxINNERxEXPERTS")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--load", choices=["even", "uneven"], default="even")
    options = parser.parse_args()
    hidden, inner, experts = map(int, options.shape.split("x"))
    rows = options.tokens * TOP_K
    ends_E = ends_of(options.load, experts, rows)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.shape}, ", end="")
    print(f"{options.tokens} tokens, load {options.load}")
    contenders = ["cuBLAS", "grouped", *(["QuACK"] if has_quack() else [])]
    print(
        "| |" + "".join(f" {name}, us | TFLOP/s |" for name in contenders) + "\n|---|" + "---|---|" * len(contenders)
    )
    totals = [0.0] * len(contenders)
    given = hidden, inner, experts, options.tokens
    fused = quack_products(*given, ends_E) if has_quack() else [None] * 6
    for (name, (left, right, grouped_left, grouped_right, flops)), quack in zip(
        products(*given).items(), fused, strict=True
    ):
        calls = [
            lambda a=left, b=right: a @ b,
            lambda a=grouped_left, b=grouped_right: F.grouped_mm(a, b, offs=ends_E),
            *([quack] if quack else []),
        ]
        times = [do_bench(call, warmup=10, rep=40, return_mode="median") for call in calls]
        cells = " | ".join(f"{1000 * ms:.0f} | {flops / ms / 1e9:.0f}" for ms in times)
        print(f"| {name} | {cells} |", flush=True)
        totals = [total + 1000 * ms for total, ms in zip(totals, times, strict=True)]
    print("| all |" + "".join(f" {total:.0f} | |" for total in totals))


if __name__ == "__main__":
    main()
