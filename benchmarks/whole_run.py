"""Where the wall time of the whole method goes: ``upit fit`` with nothing but the method, beside its training steps.

    python -m benchmarks.whole_run [-c configs/quickstart.yaml] [any other argument of upit fit]

Without validation, report, checkpoints and pictures. ``steps`` is what the optimizer steps would take at full speed,
the median over stretches between two logged steps, where the host waits for the device anyway; ``first step`` is what
the first of a phase takes beyond that: compiling, and the capture of CUDA graphs. ``whole`` is the wall time from the
start of the fit to its end.
"""

import sys
import tempfile
import time
from collections import defaultdict
from statistics import median

import torch
from lightning.pytorch import Callback

from callbacks import ExpertHarvest, Upcycling
from upit.cli.main import main as upit


class Clock(Callback):
    """Seconds of each part of a fit; prints a table at the end."""

    def __init__(self) -> None:
        self.starts: dict[str, float] = {}  # of each phase's first step
        self.ends: dict[str, list[float]] = defaultdict(list)  # of each phase's steps
        self.harvest: list[float] = []

    def on_fit_start(self, trainer, pl_module) -> None:
        self.start = _now()
        for callback in trainer.callbacks:
            if isinstance(callback, ExpertHarvest):
                callback._save = self._timed(callback._save, self.harvest)  # type: ignore[method-assign]
            if isinstance(callback, Upcycling):
                self.upcycling = callback

    def _timed(self, function, seconds: list[float]):
        def call(*args, **kwargs):
            start = _now()  # after the step before, which is none of this
            function(*args, **kwargs)
            seconds.append(_now() - start)

        return call

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if pl_module.phase not in self.starts:
            self.starts[pl_module.phase] = _now()

    def on_upcycling_start(self, trainer, pl_module, event) -> None:
        self.event_start = _now()

    def on_upcycling_end(self, trainer, pl_module, event) -> None:
        self.starts[pl_module.phase] = _now()
        self.event = self.starts[pl_module.phase] - self.event_start

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        ends = self.ends[pl_module.phase]
        ends.append(time.perf_counter() if ends else _now())

    def on_train_end(self, trainer, pl_module) -> None:
        self.train_end = _now()

    def on_fit_end(self, trainer, pl_module) -> None:
        whole, every = _now() - self.start, trainer.log_every_n_steps
        base, *harvests = self.harvest
        steps, parts = 0.0, {}
        for phase, ends in self.ends.items():
            step = median(later - end for end, later in zip(ends, ends[every:], strict=False)) / every
            steps += len(ends) * step
            parts[f"{phase}: {len(ends)} steps of {1000 * step:.1f} ms"] = len(ends) * step
            parts[f"{phase}: first step"] = ends[0] - self.starts[phase] - step
        parts |= {"copying the base": base, f"harvest: {len(harvests)}": sum(harvests), **self.upcycling.wall_seconds}
        parts["comparing logits"] = self.event - sum(self.upcycling.wall_seconds.values())
        parts["teardown"] = whole + self.start - self.train_end
        parts["all else"] = whole - sum(parts.values())
        print(f"\n| | seconds | of the steps |\n|---|---|---|\n| steps | {steps:.1f} | 1.00 |")
        for name, seconds in parts.items():
            print(f"| {name} | {seconds:.2f} | {seconds / steps:.3f} |")
        print(f"| whole | {whole:.1f} | {whole / steps:.2f} |")


def _now() -> float:
    """The time once the device has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    arguments = sys.argv[1:] or ["-c", "configs/quickstart.yaml"]
    with tempfile.TemporaryDirectory() as folder:
        clock = "[{class_path: benchmarks.whole_run.Clock}]"
        bare = ["--trainer.callbacks", clock, "--trainer.limit_val_batches", "0", "--trainer.default_root_dir", folder]
        upit(["fit", *arguments, *bare, "--trainer.enable_checkpointing", "false"])


if __name__ == "__main__":
    main()
