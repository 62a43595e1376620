"""What looking at a run costs: steps and validations of one fit, with everything that looks on and off in turns.

    python -m benchmarks.metrics_cost [--device cpu|cuda] [--rounds 80]

Post-training of a MoE from scratch; ``cuda`` takes SmolLM2-135M's width, compiled, in CUDA graphs. A round is three
steps in random order: ``off``, nothing looks; ``on``, metrics are collected, the collapse guard and the routing
callback are there; ``logged``, the same and a logged step, with the learning rate, to TensorBoard and CSV. Every
second validation counts and writes the routing. Medians of the rounds' differences, so that each compares steps that
saw the same machine; all steps have the same batch, and on the CPU the clock is the process's own time.
"""

import argparse
import random
import tempfile
import time
from collections import defaultdict
from statistics import median, quantiles

import lightning as L
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from callbacks import CollapseGuard, CurvesPicture, HParams, RoutingPicture
from callbacks.pictures.base import Pictures
from datamodules import ReasoningGymDataModule
from lightning_modules import MoEModule
from upit.model.families import moe_config
from upit.model.loading.build import build, scratch_config

STEPS = ["off", "on", "logged"]
VALIDATIONS = ["validation off", "validation on"]
FAMILIES = {
    "letters": {"letter_counting": {}},
    "arithmetic": {"chain_sum": {}},
    "logic": {"syllogism": {}},
    "counting": {"leg_counting": {}},
    "relations": {"family_relationships": {}},
}
SHAPES = {
    "cpu": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4},
    "cuda": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 16, "num_attention_heads": 9},
}
DATA = {
    "cpu": {"train_size": 400, "heldout_size": 20, "max_length": 256, "batch_size": 2},
    "cuda": {"train_size": 1500, "heldout_size": 40, "max_length": 1024, "batch_size": 16},
}


class Turns(Callback):
    """Switches everything that looks on and off, step by step, and keeps the seconds of each."""

    def __init__(self, watchers: list[Callback], device: str) -> None:
        self.watchers, self.cuda = watchers, device == "cuda"
        self.draw = random.Random(0)
        self.kinds: list[str] = []
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.drawing = 0.0
        self.batch: dict[str, torch.Tensor] = {}  # the same in all steps

    def now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def be(self, trainer, module, kind: str) -> None:
        self.kind = kind
        on = kind not in ("off", "validation off")
        trainer.callbacks = [*(self.watchers if on else []), self]
        trainer.loggers = self.loggers if on else []
        trainer.log_every_n_steps = int(kind == "logged")
        module.means.update = self.update if on else lambda *_: None

    def turn(self, trainer, module, kind: str | None = None) -> None:
        """Go over to the next kind of step, or to a kind of validation."""
        self.kinds = self.kinds or self.draw.sample(STEPS, len(STEPS))
        self.be(trainer, module, kind or self.kinds.pop())
        self.start = self.now()

    def on_fit_start(self, trainer, pl_module) -> None:
        self.loggers, self.update = trainer.loggers, pl_module.means.update

    def on_train_start(self, trainer, pl_module) -> None:
        self.turn(trainer, pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.batch = self.batch or dict(batch)
        batch.update(self.batch)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.seconds[self.kind].append(self.now() - self.start)
        self.turn(trainer, pl_module)

    def on_validation_start(self, trainer, pl_module) -> None:
        self.kinds.append(self.kind)  # of the next step, put off
        count = sum(len(self.seconds[kind]) for kind in VALIDATIONS)
        self.turn(trainer, pl_module, VALIDATIONS[count % 2])

    def on_validation_end(self, trainer, pl_module) -> None:
        self.seconds[self.kind].append(self.now() - self.start)
        self.turn(trainer, pl_module)

    def on_train_end(self, trainer, pl_module) -> None:
        trainer.loggers = self.loggers
        start = self.now()
        for watcher in self.watchers:
            if isinstance(watcher, Pictures):
                watcher.show(trainer)
        self.drawing = self.now() - start


def fit(device: str, rounds: int, folder: str) -> Turns:
    L.seed_everything(0)
    data = ReasoningGymDataModule(families=FAMILIES, cache_dir=f"{folder}/cache", **DATA[device])
    data.prepare_data()
    data.setup("fit")
    dense = scratch_config({**SHAPES[device], "max_position_embeddings": 2048}, data.tokenizer)
    build(moe_config(dense, num_experts=8, top_k=2)).save_pretrained(f"{folder}/moe")
    guard = CollapseGuard(min_share=0.0, min_entropy=0.0)
    watchers = [HParams(), LearningRateMonitor(), guard, RoutingPicture(), CurvesPicture()]
    turns = Turns(watchers, device)
    trainer = L.Trainer(
        accelerator="gpu" if device == "cuda" else "cpu", devices=1, default_root_dir=f"{folder}/run",
        precision="bf16-mixed" if device == "cuda" else 32, max_steps=rounds * len(STEPS), max_epochs=-1,
        val_check_interval=rounds * len(STEPS) // 20, check_val_every_n_epoch=None, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        callbacks=[*watchers, turns],
        logger=[TensorBoardLogger(folder, name="run", version=""), CSVLogger(folder, name="run", version="")],
    )  # fmt: skip
    fast = {"compile": device == "cuda", "cuda_graphs": device == "cuda"}
    trainer.fit(MoEModule(model=f"{folder}/moe", lr=1e-4, **fast), datamodule=data)
    return turns


def row(name: str, off: list[float], on: list[float]) -> str:
    """Of pairs, without the first two, which warm up."""
    extra = [b - a for a, b in zip(off[2:], on[2:], strict=False)]
    base = median(off[2:])
    low, middle, high = (x / base for x in quantiles(extra, n=4))
    return f"| {name} | {1e3 * base:.1f} | {1e3 * base * middle:+.2f} | {middle:+.2%} | {low:+.1%} to {high:+.1%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=list(SHAPES), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=80)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        turns = fit(options.device, options.rounds, folder)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}, {options.rounds} rounds")
    print("| | off, ms | added, ms | share | quartiles |\n|---|---|---|---|---|")
    off, on, logged = (turns.seconds[kind] for kind in STEPS)
    print(row("step", off, on), row("logged step", off, logged), sep="\n")
    print(row("validation", *(turns.seconds[kind] for kind in VALIDATIONS)))
    print(f"The pictures of the routing and the curves, drawn once: {turns.drawing:.2f} s")


if __name__ == "__main__":
    main()
