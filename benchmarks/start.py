"""Time until the command line answers, against the bare imports that it can't do without.

    python -m benchmarks.start [--rounds 5]

Processes in turns, wall time; medians.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

BARE = "from lightning.pytorch.cli import LightningCLI; import transformers.models.llama.modeling_llama"
CONTENDERS = {
    "import of LightningCLI and transformers' Llama": ["-c", BARE],
    "upit --help": ["-m", "upit", "--help"],
    "upit fit --help": ["-m", "upit", "fit", "--help"],
    "upit fit --print_config": ["-m", "upit", "fit", "-c", "configs/quickstart.yaml", "--print_config"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for turn in range(options.rounds + 1):  # the first fills the page cache
        for name, arguments in CONTENDERS.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    reference = next(iter(seconds.values()))
    print("| | seconds | range | / import |\n|---|---|---|---|")
    for name, own in seconds.items():
        ratio = median(a / b for a, b in zip(own, reference, strict=True))
        print(f"| {name} | {median(own):.2f} | {min(own):.2f} to {max(own):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
