"""Run whole programs in turns and measure each: wall time until its output is on disk, peak resident memory.

Imports nothing heavy: a child's peak can't be told from its parent's where that is higher.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple


class Cost(NamedTuple):
    seconds: float
    peak_mb: float  # resident, mapped files included


def checkpoints(folder: Path) -> tuple[Path, list[Path]]:
    """A base and 8 checkpoints of SmolLM2-135M's shape in bfloat16; made once."""
    base, steps = folder / "base", [folder / f"step_{i}" for i in range(1, 9)]
    if not steps[-1].exists():
        subprocess.run([sys.executable, Path(__file__).with_name("checkpoints.py"), folder], check=True)
    return base, steps


def drop_cache(folders: Sequence[Path]) -> None:
    """Let the next reader find the files on the disk, not in memory."""
    for file in (file for folder in folders for file in folder.iterdir()):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(command: Sequence[str | Path], output: Path) -> Cost:
    """Run a command until its output is on disk.

    Raises: RuntimeError: it fails; with the end of what it printed.
    """
    shutil.rmtree(output, ignore_errors=True)
    log = output.with_suffix(".log")
    start = time.perf_counter()
    with log.open("w") as stream:
        child = subprocess.Popen([str(part) for part in command], stdout=stream, stderr=stream)
        _, status, usage = os.wait4(child.pid, 0)
    if status:
        raise RuntimeError(f"{command[0]} failed:\n{log.read_text()[-2000:]}")
    for file in output.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)
    return Cost(time.perf_counter() - start, usage.ru_maxrss / 1e3)


def take_turns(
    contenders: Mapping[str, Callable[[], Cost]], rounds: int, before: Callable[[], None]
) -> dict[str, list[Cost]]:
    """Each contender once a round, ``before`` in front of each."""
    costs: dict[str, list[Cost]] = {name: [] for name in contenders}
    for turn in range(rounds):
        for name, run in contenders.items():
            before()
            costs[name].append(run())
            print(f"round {turn + 1}  {name:24} {costs[name][-1].seconds:7.1f} s  {costs[name][-1].peak_mb:7.0f} MB")
    return costs


def table(costs: Mapping[str, Sequence[Cost]], reference: str) -> str:
    """Markdown: medians, and the median over the rounds of each round's ratio to the reference."""
    rows = ["| | seconds | range | peak memory, MB | time / reference |", "|---|---|---|---|---|"]
    for name, own in costs.items():
        seconds = [cost.seconds for cost in own]
        ratio = median(cost.seconds / other.seconds for cost, other in zip(own, costs[reference], strict=True))
        spread = f"{min(seconds):.1f} to {max(seconds):.1f}"
        rows.append(f"| {name} | {median(seconds):.1f} | {spread} | {max(c.peak_mb for c in own):.0f} | {ratio:.2f} |")
    return "\n".join(rows)
