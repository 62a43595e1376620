"""Seed scoring against the bare forward passes it needs, and router pre-optimisation with hidden states kept or not.

    python -m benchmarks.seed_stages [--device cuda] [--shape smollm2|small] [--examples 200] [--rounds 5]

A Llama of random weights, 8 experts on disk, seed examples of 50 to 200 tokens. The contenders take turns; medians,
also of the rounds' ratios.

- ``forwards``: the experts' forward passes and losses over the same batches, which are on the device already.
- ``scoring``: all of ``SeedScorer``: reading each expert from disk into the model, batches, forward passes, records.
- ``router``: routing vectors of all experts, 4 epochs over the buckets, hidden states kept.
- ``router, anew``: the same, hidden states computed at every step.
"""

import argparse
import random
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import torch
from transformers import LlamaConfig

from upit.core.batches import collate, length_grouped, to_device
from upit.model.families import is_expert
from upit.model.forward import response_losses
from upit.model.loading.build import build
from upit.preparation.pool import Pool
from upit.router_init import RoutingVectors, routing_vectors
from upit.router_init.scoring import BATCH_TOKENS, GPU_BATCH_TOKENS, SeedScorer
from upit.router_init.seeds import LowestPerplexity

SHAPES = {
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
    "small": {
        "hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 1,
    },
}  # fmt: skip
EXPERTS = 8


def seed_data(count: int, vocabulary: int) -> SimpleNamespace:
    draw = random.Random(0)
    lengths = [draw.randrange(50, 200) for _ in range(count)]
    rows = []
    for number, length in enumerate(lengths):
        ids = [draw.randrange(3, vocabulary) for _ in range(length)]
        half = len(ids) // 2
        rows.append({"id": str(number), "domain": "any", "input_ids": ids, "labels": [-100] * half + ids[half:]})
    return SimpleNamespace(train_set=rows, tokenizer=SimpleNamespace(pad_token_id=0))


def write_experts(dense, folder: Path) -> list:
    pool = Pool(folder)
    tensors = {name: param.detach().cpu() for name, param in dense.named_parameters() if is_expert(name)}
    pool.set_base(tensors)
    for step in range(1, EXPERTS + 1):
        moved = {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        pool.add(moved, step=step, epoch=0.0, metrics={})
    return pool.experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--examples", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    cuda = options.device == "cuda"
    torch.manual_seed(0)
    config = LlamaConfig(**SHAPES[options.shape], vocab_size=49152 if cuda else 1024)
    dense = build(config).to(options.device).eval()
    data = seed_data(options.examples, config.vocab_size)
    indices = list(range(options.examples))

    def autocast() -> AbstractContextManager:
        return torch.autocast("cuda", torch.bfloat16) if cuda else nullcontext()

    with tempfile.TemporaryDirectory() as folder:
        experts = write_experts(dense, Path(folder) / "pool")
        lengths = [len(row["input_ids"]) for row in data.train_set]
        groups = length_grouped(indices, lengths, max_tokens=GPU_BATCH_TOKENS if cuda else BATCH_TOKENS)
        batches = [to_device(collate([[i] for i in g], data.train_set, pad_id=0), dense.device) for g in groups]

        @torch.no_grad()
        def forwards() -> None:
            for _ in experts:
                for batch in batches:
                    with autocast():
                        response_losses(dense, batch)[0].sum().item()

        def scoring() -> None:
            scorer = SeedScorer(dense, indices, data, file=Path(folder) / "seeds.json", autocast=autocast)
            scorer.seen["columns"] = {}
            state["seeds"] = scorer.assign(experts, LowestPerplexity())

        def router(kept: int = routing_vectors.STATES_BYTES) -> None:
            routing_vectors.STATES_BYTES = kept
            with tempfile.TemporaryDirectory() as work:
                RoutingVectors()(dense, experts, state["seeds"], data, directory=Path(work), autocast=autocast)

        state: dict = {}
        contenders = {
            "forwards": forwards,
            "scoring": scoring,
            "router": router,
            "router, anew": lambda: router(kept=0),
        }
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(options.rounds + 1):  # the first warms up
            for name, run in contenders.items():
                start = time.perf_counter()
                run()
                if cuda:
                    torch.cuda.synchronize()
                if turn:
                    seconds[name].append(time.perf_counter() - start)
    print(f"{torch.cuda.get_device_name() if cuda else 'CPU'}, torch {torch.__version__}, {options.shape}")
    print(f"{options.examples} examples, {sum(lengths)} tokens, {EXPERTS} experts; medians of {options.rounds}")
    print("| | seconds | / forwards |\n|---|---|---|")
    for name, own in seconds.items():
        ratio = median(a / b for a, b in zip(own, seconds["forwards"], strict=True))
        print(f"| {name} | {median(own):.2f} ({min(own):.2f} to {max(own):.2f}) | {ratio:.2f} |")


if __name__ == "__main__":
    main()
