"""How cost grows, one plot each: a training step over experts, expansion over N, memory of ``upit upcycle`` over size.

    python -m benchmarks.growth [--output docs/images/growth.png]

On the CPU, one thread. Steps: Mixtral of 4 layers, 256 x 704, top-2, 2,048 tokens, AdamW; medians, the counts taking
turns. Expansion: from 8 checkpoints of that model's FFNs (2.2 million parameters), DARE, cosine. Memory: two
checkpoints of random weights in bfloat16 to a MoE, peak resident set.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.contenders import measure

SMALL = {
    "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 2048, "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS, ROUNDS = [4, 8, 16, 32, 64], 7
SIZES = {"0.15": (576, 1536, 30), "0.40": (960, 2560, 32), "0.78": (1280, 3456, 36)}  # billion parameters


def step_times() -> dict[int, float]:
    """Milliseconds of a training step by the number of experts."""
    import torch
    from transformers import LlamaConfig

    from upit.core.batches import collate
    from upit.model.families import moe_config
    from upit.model.forward import response_losses
    from upit.model.loading.build import build

    torch.set_num_threads(1)
    rows = [{"input_ids": list(range(3, 259)), "labels": [-100] * 128 + list(range(131, 259))} for _ in range(8)]
    batch = collate([[i] for i in range(8)], rows, pad_id=0)  # type: ignore[arg-type]
    models = {count: build(moe_config(LlamaConfig(**SMALL), num_experts=count, top_k=2)).train() for count in EXPERTS}
    optimizers = {count: torch.optim.AdamW(model.parameters(), fused=True) for count, model in models.items()}
    seconds: dict[int, list[float]] = {count: [] for count in EXPERTS}
    for _ in range(ROUNDS):
        for count, model in models.items():
            start = time.process_time()
            response_losses(model, batch)[0].mean().backward()
            optimizers[count].step()
            optimizers[count].zero_grad()
            seconds[count].append(time.process_time() - start)
    return {count: 1000 * median(own[1:]) for count, own in seconds.items()}


def expansion_times() -> dict[int, float]:
    """Seconds of an expansion from 8 checkpoints by the number of experts asked for."""
    import torch
    from transformers import LlamaConfig

    from upit.expansion.expand import expand
    from upit.model.families import is_expert
    from upit.model.loading.build import build
    from upit.preparation.pool import Pool

    torch.manual_seed(0)
    tensors = {
        name: param.detach() for name, param in build(LlamaConfig(**SMALL)).named_parameters() if is_expert(name)
    }
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder) / "pool")
        pool.set_base(tensors)
        for step in range(1, 9):
            pool.add(
                {name: t + 0.01 * torch.randn_like(t) for name, t in tensors.items()}, step=step, epoch=0.0, metrics={}
            )
        for count in EXPERTS[1:]:
            start = time.process_time()
            expand(pool.experts, pool.base, num_experts=count, output=Path(folder) / f"to_{count}")
            found[count] = time.process_time() - start
    return found


WRITE = """
import sys, torch
from transformers import AutoModelForCausalLM, LlamaConfig
folder, hidden, inner, layers = sys.argv[1], *map(int, sys.argv[2:])
config = LlamaConfig(hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers, vocab_size=49152,
    num_attention_heads=hidden // 64, num_key_value_heads=hidden // 64, tie_word_embeddings=True)
model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
for checkpoint in ("base", "step"):
    model.save_pretrained(f"{folder}/{checkpoint}")
"""


def memory_peaks() -> dict[str, tuple[float, float]]:
    """Peak memory of ``upit upcycle``, and the size of the MoE that it writes, in MB, by size of the dense model."""
    found = {}
    for size, shape in SIZES.items():
        with tempfile.TemporaryDirectory(dir=".cache") as name:
            folder = Path(name)
            subprocess.run([sys.executable, "-c", WRITE, name, *map(str, shape)], check=True)
            experts = json.dumps([str(folder / "base"), str(folder / "step")])
            command = [sys.executable, "-m", "upit", "upcycle", "--base", folder / "base", "--experts", experts]
            command += ["--top_k", "1", "--router", "RandomRouter", "--output", folder / "moe"]
            peak = measure(command, folder / "moe").peak_mb
            found[size] = peak, sum(file.stat().st_size for file in (folder / "moe").glob("*.safetensors")) / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/images/growth.png"))
    options = parser.parse_args()
    Path(".cache").mkdir(exist_ok=True)
    peaks = memory_peaks()  # first: a child's peak can't be told from its parent's, so nothing heavy is imported yet
    steps, expansions = step_times(), expansion_times()
    import matplotlib.pyplot as plt

    print("experts | step, ms | expansion, s")
    for count in EXPERTS:
        print(f"{count} | {steps[count]:.0f} | {expansions.get(count, float('nan')):.2f}")
    print("billion parameters | peak, MB | MoE, MB")
    for size, (peak, written) in peaks.items():
        print(f"{size} | {peak:.0f} | {written:.0f}")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    axes[0].plot(EXPERTS, list(steps.values()), "o-", color="#0072B2")
    axes[0].set(title="Training step, top-2", xlabel="experts", ylabel="ms of CPU time", xticks=EXPERTS)
    axes[1].plot(list(expansions), list(expansions.values()), "o-", color="#0072B2")
    axes[1].set(
        title="Expansion from 8 checkpoints", xlabel="experts", ylabel="s of CPU time", xticks=list(expansions)
    )
    for label, style, index in (("peak memory", "o-", 0), ("the MoE's file", "s--", 1)):
        color = ("#0072B2", "#D55E00")[index]
        axes[2].plot([float(s) for s in peaks], [p[index] for p in peaks.values()], style, color=color, label=label)
    axes[2].set(title="upit upcycle, two experts", xlabel="billion parameters of the dense model", ylabel="MB")
    axes[2].legend(frameon=False)
    for axis in axes:
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.output, dpi=120)


if __name__ == "__main__":
    main()
