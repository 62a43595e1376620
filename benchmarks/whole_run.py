"""Where the wall time of the whole method goes: ``upit fit`` with nothing but the method, beside its training steps.

    python -m benchmarks.whole_run [-c configs/quickstart.yaml] [any other argument of upit fit]

Without validation, report, checkpoints and pictures. ``steps`` is what the optimizer steps would take at the median
speed of their phase, ``more`` what some took beyond it: compiling, and the capture of CUDA graphs; ``whole`` is the
wall time from the start of the fit to its end.
"""

import sys
import tempfile
import time
from collections import defaultdict
from statistics import median

import torch
from lightning.pytorch import Callback

from callbacks import ExpertHarvest, Upcycling
from upit.cli import main as upit


class Clock(Callback):
    """Seconds of each part of a fit; prints a table at the end."""

    def __init__(self) -> None:
        self.steps: dict[str, list[float]] = defaultdict(list)
        self.harvest: list[float] = []
        self.first = 0.0

    def on_fit_start(self, trainer, pl_module) -> None:
        self.start = time.perf_counter()
        for callback in trainer.callbacks:
            if isinstance(callback, ExpertHarvest):
                callback._save = self._timed(callback._save, self.harvest)  # type: ignore[method-assign]
            if isinstance(callback, Upcycling):
                self.upcycling = callback

    def _timed(self, function, seconds: list[float]):
        def call(*args, **kwargs):
            _wait()  # for the step before, which is none of this
            start = time.perf_counter()
            function(*args, **kwargs)
            seconds.append(time.perf_counter() - start)

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        _wait()
        self.begun = time.perf_counter()
        self.first = self.first or self.begun

    def on_upcycling_end(self, trainer, pl_module, event) -> None:
        _wait()
        self.begun = time.perf_counter()  # the swap is none of the step that follows

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        _wait()
        self.steps[pl_module.phase].append(time.perf_counter() - self.begun)

    def on_fit_end(self, trainer, pl_module) -> None:
        whole = time.perf_counter() - self.start
        steps = sum(len(own) * median(own) for own in self.steps.values())
        parts = {f"{phase}: {len(own)} steps": len(own) * median(own) for phase, own in self.steps.items()}
        base, *harvests = self.harvest
        parts |= {"copying the base": base, f"harvest: {len(harvests)}": sum(harvests), **self.upcycling.wall_seconds}
        parts["before the first step"] = self.first - self.start - base
        parts |= {f"{phase}: more": sum(own) - len(own) * median(own) for phase, own in self.steps.items()}
        parts["between steps, and all else"] = whole - sum(parts.values())
        print(f"\n| | seconds | of the steps |\n|---|---|---|\n| steps | {steps:.1f} | 1.00 |")
        for name, seconds in parts.items():
            print(f"| {name} | {seconds:.2f} | {seconds / steps:.3f} |")
        print(f"| whole | {whole:.1f} | {whole / steps:.2f} |")


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def main() -> None:
    arguments = sys.argv[1:] or ["-c", "configs/quickstart.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        clock = "[{class_path: benchmarks.whole_run.Clock}]"
        bare = ["--trainer.callbacks", clock, "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", folder]
        upit(["fit", *arguments, *bare, "--trainer.enable_checkpointing", "false"])


if __name__ == "__main__":
    main()
