"""The six products of an experts layer, forward and backward: torch's grouped ones beside cuBLAS's of the same FLOPs.

    python -m benchmarks.grouped_products [--shape 576x1536x8] [--tokens 16384]

Medians of CUDA events, bf16, top-2, an even load. cuBLAS takes all rows with one expert's weights, like a dense FFN.
"""

import argparse

import torch
import torch.nn.functional as F
from triton.testing import do_bench

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="576x1536x8", help="HIDDENxINNERxEXPERTS")
    parser.add_argument("--tokens", type=int, default=16384)
    options = parser.parse_args()
    hidden, inner, experts = map(int, options.shape.split("x"))
    rows = options.tokens * TOP_K
    ends_E = torch.linspace(rows / experts, rows, experts, device="cuda").to(torch.int32)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.shape}, {options.tokens} tokens")
    print("| | cuBLAS, us | TFLOP/s | grouped, us | TFLOP/s |\n|---|---|---|---|---|")
    totals = [0.0, 0.0]
    for name, (left, right, grouped_left, grouped_right, flops) in products(
        hidden, inner, experts, options.tokens
    ).items():
        calls = (
            lambda a=left, b=right: a @ b,
            lambda a=grouped_left, b=grouped_right: F.grouped_mm(a, b, offs=ends_E),
        )
        times = [do_bench(call, warmup=10, rep=40, return_mode="median") for call in calls]
        cells = " | ".join(f"{1000 * ms:.0f} | {flops / ms / 1e9:.0f}" for ms in times)
        print(f"| {name} | {cells} |", flush=True)
        totals = [total + 1000 * ms for total, ms in zip(totals, times, strict=True)]
    print(f"| all | {totals[0]:.0f} | | {totals[1]:.0f} | |")


if __name__ == "__main__":
    main()
