"""Time of one MoE layer, forward and backward, against stock transformers and a dense FFN of the same FLOPs.

    python -m benchmarks.experts_layer [--tokens 16384] [--shapes 576x1536x8 ...] [--load even|skewed|empty]
        [--variants dense+c grouped_mm grouped_mm+c upit upit+c] [--graph]

Medians of CUDA events, bf16 weights; the MoE layers hold Mixtral's router too. Other variants are the names of experts
that transformers knows: ``eager``, its loop, and ``upit_triton`` and ``upit_quack`` with kernels of one kind.
"""

import argparse

import torch
from torch import nn
from transformers import LlamaConfig, MixtralConfig
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
from triton.testing import do_bench, do_bench_cudagraph

from upit.model.experts import dispatch as experts

SHAPES = ["576x1536x8", "576x1536x16", "576x1536x64", "2048x5632x8", "2048x5632x16", "4096x11008x8"]
TOP_K = 2


def moe_layer(hidden: int, inner: int, num_experts: int, implementation: str) -> nn.Module:
    config = MixtralConfig(
        hidden_size=hidden, intermediate_size=inner, num_local_experts=num_experts, num_experts_per_tok=TOP_K
    )
    config._experts_implementation = implementation
    layer = MixtralSparseMoeBlock(config)
    for param in layer.parameters():
        nn.init.normal_(param, std=0.02)
    return layer.to("cuda", torch.bfloat16)


def steer(layer: nn.Module, load: str) -> None:
    """Skew the router: ``skewed`` sends most tokens to two experts, ``empty`` none to the last."""
    bias_E = torch.zeros(layer.gate.num_experts, device="cuda")
    if load == "skewed":
        bias_E = torch.linspace(3.0, 0.0, layer.gate.num_experts, device="cuda")
    elif load == "empty":
        bias_E[-1] = -1e4

    def biased(router, args, output):
        probs_TE = (output[0].float() + bias_E).softmax(-1)
        top = probs_TE.topk(TOP_K, dim=-1)
        return output[0], top.values / top.values.sum(-1, keepdim=True), top.indices

    if load != "even":
        layer.gate.register_forward_hook(biased)


def measure(layer: nn.Module, options: argparse.Namespace, hidden: int, *, profile: bool) -> float:
    """Milliseconds of a forward and backward pass."""
    x_BTH = torch.randn(1, options.tokens, hidden, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn_like(x_BTH)
    wanted = [x_BTH, *layer.parameters()]

    def step():
        torch.autograd.grad(layer(x_BTH), wanted, grad)

    for _ in range(3):
        step()
    if profile:
        with torch.profiler.profile() as profiler:
            for _ in range(10):
                step()
            torch.cuda.synchronize()
        print(profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=25, max_name_column_width=60))
    if options.graph:
        return do_bench_cudagraph(step, rep=100, return_mode="median")
    return do_bench(step, warmup=50, rep=300, return_mode="median")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="HIDDENxINNERxEXPERTS")
    parser.add_argument("--load", choices=["even", "skewed", "empty"], default="even")
    parser.add_argument("--variants", nargs="*", default=["dense+c", "grouped_mm", "grouped_mm+c", "upit", "upit+c"])
    parser.add_argument("--graph", action="store_true", help="as CUDA graphs: the device's time, not the host's")
    parser.add_argument("--profile", action="store_true", help="print where the time of each upit variant goes")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.tokens} tokens, load {options.load}")
    names = options.variants
    print(" | ".join(["shape", *[f"{name} ms" for name in names], f"{names[0]} / {names[-1]}"]))
    for shape in options.shapes:
        hidden, inner, num_experts = map(int, shape.split("x"))
        times = {}
        for name in names:
            torch._dynamo.reset()
            kind, compiled = name.removesuffix("+c"), name.endswith("+c")
            if kind == "dense":
                config = LlamaConfig(hidden_size=hidden, intermediate_size=inner * TOP_K)
                layer = LlamaMLP(config).to("cuda", torch.bfloat16)
            else:
                layer = moe_layer(hidden, inner, num_experts, experts.NAME if kind == "upit" else kind)
                steer(layer, options.load)
            if compiled:
                layer.compile()
            times[name] = measure(layer, options, hidden, profile=options.profile and "upit" in name)
            del layer
            torch.cuda.empty_cache()
        row = [shape, *[f"{times[name]:.2f}" for name in names], f"{times[names[0]] / times[names[-1]]:.2f}"]
        print(" | ".join(row), flush=True)


if __name__ == "__main__":
    main()
