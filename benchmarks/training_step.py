"""Tokens a second of ``upit fit`` in the MoE phase, against a dense model of the same active FLOPs and stock experts.

    python -m benchmarks.training_step [--variants dense dense+g upit+g stock] [--precision bf16-mixed] [--profile DIR]
        [--validate]

SmolLM2-135M's shape, 16 x 1024 packed tokens, fused AdamW, through the command line with configs/smollm2.yaml. Each
variant is a process of its own; steps are timed between synchronisations, after a warm-up. ``--validate`` counts what
is compiled from a phase's third step on, validations included, and times nothing. Weights of the dense models are
random, those of the MoE SmolLM2's in every expert, with a random router.

- ``dense``: FFN twice as wide, which is what 2 of 8 experts compute; compiled.
- ``upit``: 8 experts, top-2, upcycled after a few dense steps as in the vanilla baseline; compiled.
- ``dense+g``, ``upit+g``: their decoder layers as CUDA graphs too.
- ``stock``, ``stock+c``: the same MoE with transformers' ``grouped_mm`` experts, eager and compiled.
"""

import argparse
import cProfile
import json
import os
import pstats
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Callback

ROOT = Path(__file__).parents[1]
WIDE = {
    "hidden_size": 576,
    "intermediate_size": 3072,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
}
DENSE_STEPS, WARM_UP, TIMED, VALIDATE_EVERY = 8, 15, 30, 13


class StepTimer(Callback):
    """Write tokens a second of the last ``timed`` steps, peak memory and recompilations to ``file``."""

    def __init__(self, file: str, first: int, timed: int, profile: str | None = None) -> None:
        self.file, self.first, self.timed, self.profile = file, first, timed, profile
        self.tokens = self.real = 0
        self.profiler: Any = None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        step = trainer.global_step
        if step == self.first:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.recompiles = _recompiles()
            self.start = time.perf_counter()
        if self.first <= step < self.first + self.timed:
            self.tokens += batch["input_ids"].numel()
            self.real += (batch["example_ids"] >= 0).sum()
        if self.profile and step == self.first + self.timed:
            self.profiler = torch.profiler.profile()
            self.profiler.__enter__()
        if self.profile and step == self.first + self.timed + 4:
            self.python = cProfile.Profile()
            self.python.enable()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == self.first + self.timed:
            torch.cuda.synchronize()
            seconds = time.perf_counter() - self.start
            figures = {
                "tokens_per_second": self.tokens / seconds,
                "step_ms": 1000 * seconds / self.timed,
                "real_tokens": float(self.real) / self.tokens,
                "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
                "recompiles": _recompiles() - self.recompiles,
            }
            Path(self.file).write_text(json.dumps(figures))
        if self.profiler and trainer.global_step == self.first + self.timed + 3:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            events = self.profiler.key_averages()
            tables = [events.table(sort_by=f"self_{kind}_time_total", row_limit=45) for kind in ("cuda", "cpu")]
            Path(self.profile).write_text("\n".join(tables))
            self.profiler = None
        if self.profile and trainer.global_step == self.first + self.timed + 9:
            self.python.disable()
            with Path(self.profile).open("a") as stream:
                for order in ("tottime", "cumulative"):
                    pstats.Stats(self.python, stream=stream).sort_stats(order).print_stats(45)


def _recompiles() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def config(variant: str, figures: Path, options: argparse.Namespace) -> dict[str, Any]:
    compiled = variant != "stock"
    is_dense = variant.startswith("dense")
    first = (0 if is_dense else DENSE_STEPS) + (2 if options.validate else WARM_UP)
    timer = {"file": str(figures), "first": first, "timed": TIMED}
    timer["profile"] = f"{options.profile}/{variant.replace('+', '_')}.txt" if options.profile else None
    fast = {"compile": compiled, "cuda_graphs": variant.endswith("+g")}
    dense: dict[str, Any] = {**fast} if is_dense else {}
    if is_dense or options.from_scratch:
        dense |= {"model": None, "config": WIDE if is_dense else {**WIDE, "intermediate_size": 1536}}
    method: dict[str, Any] = {"harvest": None, "upcycling": None}
    if not is_dense:
        vanilla = yaml.safe_load((ROOT / "configs/baselines/vanilla.yaml").read_text())["upcycling"]
        swap = {"at_epoch": None, "at_step": DENSE_STEPS, "drift_examples": 4}
        method = {"harvest": {"every_n_steps": DENSE_STEPS}, "upcycling": {**swap, **vanilla}}
    return {
        "trainer": {
            "max_steps": first + TIMED + (10 if options.profile else 1),
            "max_epochs": 4,
            "precision": options.precision,
            "limit_val_batches": 2 if options.validate else 0,
            "val_check_interval": VALIDATE_EVERY,
            "check_val_every_n_epoch": None,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "benchmarks.training_step.StepTimer", "init_args": timer}],
            "logger": False,
        },
        "model": {"init_args": {"dense": {"init_args": dense}, "moe": {"init_args": fast}}},
        "data": {"init_args": {"tokenizer": None} if options.from_scratch else {}},
        **method,
    }


def run_variant(variant: str, options: argparse.Namespace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        figures, file = Path(folder) / "figures.json", Path(folder) / "bench.yaml"
        file.write_text(yaml.safe_dump(config(variant, figures, options)))
        command = [sys.executable, "-m", "benchmarks.training_step", "--run", variant, str(file), f"{folder}/run"]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode:
            print(result.stderr[-3000:], file=sys.stderr)
            raise SystemExit(f"{variant} failed")
        return json.loads(figures.read_text())


def fit(variant: str, file: str, run: str) -> None:
    if variant.startswith("stock"):
        from upit.model.experts import dispatch as experts

        experts.NAME = "grouped_mm"
    from upit.cli.main import main as upit

    os.environ.pop("UPIT_RUN_DIR", None)
    upit(["fit", "-c", "configs/smollm2.yaml", "-c", file, "--trainer.default_root_dir", run])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--variants", nargs="*", default=["dense", "dense+g", "upit", "upit+g", "stock", "stock+c"])
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--profile", help="folder for a profile of three steps of each variant")
    parser.add_argument("--from-scratch", action="store_true", help="without the SmolLM2 weights and tokenizer")
    parser.add_argument("--validate", action="store_true", help="count recompilations around validations")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        fit(*options.run)
        return
    if options.validate and options.profile:
        parser.error("--validate times nothing; leave it or --profile out")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {options.precision}")
    if options.validate:
        for variant in options.variants:
            print(f"{variant}: {run_variant(variant, options)['recompiles']} recompilations", flush=True)
        return
    print("variant | tokens/s | step ms | real tokens | peak GiB | recompiles")
    for variant in options.variants:
        f = run_variant(variant, options)
        print(
            f"{variant} | {f['tokens_per_second']:.0f} | {f['step_ms']:.1f} | {f['real_tokens']:.1%} | "
            f"{f['peak_gib']:.1f} | {f['recompiles']}",
            flush=True,
        )


if __name__ == "__main__":
    main()
