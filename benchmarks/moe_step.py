"""A MoE training step in a bare loop: ours against stock transformers, at any shape, precision and number of experts.

    python -m benchmarks.moe_step [--shape smollm2 | sheared-llama-2.7b] [--precision bf16-mixed | bf16-true]
        [--variants dense+c dense+c+g upit+c upit+c+g stock stock+c] [--experts 8] [--rows 16] [--accumulate 1]

Random weights, random tokens in packed rows of 1,024, half of them responses; fused AdamW, clipped gradients, the
balance loss. Every variant in this process, one after the other; ``+c`` compiles the decoder layers, ``+g`` runs them
as CUDA graphs, ``+b`` leaves out the balance loss. Milliseconds are the mean of the timed steps between two
synchronisations.

- ``dense``: a dense model whose FFN is top-2 times as wide, the same active FLOPs; attention, loss head and clipping
  are ours.
- ``upit``: experts and router are ours too. ``upit_triton`` and ``upit_quack``: with kernels of one kind.
- ``stock``: transformers' Mixtral as it is, ``grouped_mm`` experts, SDPA over whole rows, its loss and auxiliary loss;
  torch's clipping.

Model FLOPs utilisation counts 6 FLOPs a token for each active weight of a matrix, and causal attention over whole
rows, against 989 TFLOP/s.
"""

import argparse
import gc
import random
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig

from lightning_modules.optimizers import AdamW
from upit.core.batches import Batch, collate, to_device, token_mask
from upit.model.cuda_graphs import GraphedBody
from upit.model.experts import dispatch as experts
from upit.model.families import moe_config
from upit.model.forward import Body, body_states, response_loss
from upit.model.loading.build import build
from upit.model.losses import load_balancing_loss
from upit.model.routers import last_routing

SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True,
    },
    "sheared-llama-2.7b": {
        "hidden_size": 2560, "intermediate_size": 6912, "num_hidden_layers": 32, "num_attention_heads": 20,
        "num_key_value_heads": 20, "vocab_size": 32000, "tie_word_embeddings": False,
    },
}  # fmt: skip
VARIANTS = ["dense+c", "dense+c+g", "upit+c", "upit+c+g", "stock", "stock+c"]
DEVICE, TOP_K, LENGTH, LONGEST, PEAK, BALANCE = "cuda", 2, 1024, 300, 989e12, 0.01
WARM_UP = 5


def packed_batch(rows: int, vocabulary: int, seed: int) -> Batch:
    draw = random.Random(seed)
    dataset, layout = [], []
    for _ in range(rows):
        row, room = [], LENGTH
        while room >= 50:
            size = min(room, draw.randrange(50, LONGEST))
            ids = [draw.randrange(3, vocabulary) for _ in range(size)]
            row.append(len(dataset))
            dataset.append({"input_ids": ids, "labels": [-100] * (size // 2) + ids[size // 2 :]})
            room -= size
        layout.append(row)
    batch = collate(layout, dataset, pad_id=0, length=LENGTH, longest=LONGEST)  # type: ignore[arg-type]
    return to_device(batch, torch.device(DEVICE))


def model_of(variant: str, dense: LlamaConfig, num_experts: int):
    kind, compiled = variant.split("+")[0], "+c" in variant
    config: PretrainedConfig = dense
    if kind != "dense":
        config = moe_config(dense, num_experts=num_experts, top_k=TOP_K)
    with torch.device(DEVICE):
        if kind == "stock":
            config._experts_implementation = "grouped_mm"
            config.output_router_logits, config.router_aux_loss_coef = True, BALANCE
            model = AutoModelForCausalLM.from_config(
                config, attn_implementation="sdpa", dtype=torch.get_default_dtype()
            )
        else:
            model = build(config)
        if kind.startswith("upit_"):
            experts.use(model, kind)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    return model.train()


def loss_of(kind: str, model, batch: Batch, body: Body, balanced: bool) -> torch.Tensor:
    if kind == "stock":
        return model(input_ids=batch["input_ids"], labels=batch["labels"], use_cache=False).loss
    total, targets_L = response_loss(model, batch, body=body)
    loss = total / len(targets_L)
    if kind == "dense" or not balanced:
        return loss
    logits_DTE, ids_DTK = last_routing(model)
    balance = load_balancing_loss(router_logits_DTE=logits_DTE, expert_ids_DTK=ids_DTK, mask_T=token_mask(batch))
    return loss + BALANCE * balance


def flops_per_token(model, num_experts: int) -> float:
    """Of forward and backward."""
    config = model.config
    active = 0.0
    for name, param in model.named_parameters():
        if param.ndim < 2 or "embed_tokens" in name:
            continue
        active += param.numel() * (TOP_K / num_experts if ".experts." in name else 1)
    if config.tie_word_embeddings:
        active += config.vocab_size * config.hidden_size
    return 6 * active + 6 * config.num_hidden_layers * config.hidden_size * LENGTH


def measure(variant: str, options: argparse.Namespace) -> dict[str, float]:
    fields = SHAPES[options.shape]
    if variant.startswith("dense"):
        fields = {**fields, "intermediate_size": TOP_K * int(fields["intermediate_size"])}
    torch.manual_seed(0)
    torch._dynamo.reset()
    torch.set_default_dtype(torch.bfloat16 if options.precision == "bf16-true" else torch.float32)
    model = model_of(variant, LlamaConfig(**fields), options.experts)
    optimizer = AdamW(model.parameters(), lr=1e-4, fused=True)
    body = GraphedBody() if "+g" in variant else body_states
    batches = [packed_batch(options.rows, model.config.vocab_size, seed) for seed in range(options.accumulate)]

    def context() -> AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if options.precision == "bf16-mixed" else nullcontext()

    def step() -> None:
        for batch in batches:
            with context():
                loss = loss_of(variant.split("+")[0], model, batch, body, "+b" not in variant)
            (loss / len(batches)).backward()
        if variant.startswith("stock"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        else:
            optimizer.clip(1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(WARM_UP):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    for _ in range(options.steps):
        step()
    torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / options.steps
    if options.profile:
        with torch.profiler.profile() as profiler:
            for _ in range(3):
                step()
            torch.cuda.synchronize()
        table = profiler.key_averages().table(sort_by="self_cuda_time_total", row_limit=50, max_name_column_width=90)
        Path(options.profile, f"{variant.replace('+', '_')}.txt").write_text(table)
    tokens = options.rows * LENGTH * options.accumulate
    return {
        "ms": 1000 * seconds,
        "tokens": tokens / seconds,
        "mfu": flops_per_token(model, options.experts) * tokens / seconds / PEAK,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="smollm2")
    parser.add_argument("--precision", choices=["bf16-mixed", "bf16-true"], default="bf16-mixed")
    parser.add_argument("--variants", nargs="*", default=VARIANTS)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rows", type=int, default=16, help="of 1,024 tokens in a forward pass")
    parser.add_argument("--accumulate", type=int, default=1, help="forward passes a step")
    parser.add_argument("--profile", help="folder for a profile of three steps of each variant")
    parser.add_argument("--steps", type=int, default=15, help="timed, after 5 to warm up")
    options = parser.parse_args()
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.shape}, {options.experts} experts, ",
        end="",
    )
    print(f"top-{TOP_K}, {options.precision}, {options.accumulate} x {options.rows} x {LENGTH} tokens a step")
    print("| | ms a step | tokens/s | model FLOPs utilisation | peak memory, GiB |\n|---|---|---|---|---|")
    for variant in options.variants:
        try:
            f = measure(variant, options)
            print(f"| {variant} | {f['ms']:.1f} | {f['tokens']:.0f} | {f['mfu']:.1%} | {f['gib']:.1f} |", flush=True)
        except torch.cuda.OutOfMemoryError:
            print(f"| {variant} | out of memory | | | |", flush=True)
        gc.collect()  # a graphed body is part of a cycle
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
