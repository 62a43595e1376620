"""Expansion: 8 checkpoints of SmolLM2-135M's shape to 16 experts, beside mergekit's ``dare_linear``, time per merge.

    python -m benchmarks.expansion --mergekit VENV

VENV is a virtual environment with mergekit; leave it out to do without. mergekit merges two checkpoints a run. upit's
time per merge is an eighth of one whole ``upit expand``: starting Python, choosing parents by the similarity of all
experts, 8 merges, and copying the 8 checkpoints' experts into the pool. mergekit merges whole models, upit the
experts' parameters (59 % of them).
"""

import argparse
import json
import sys
from pathlib import Path

from benchmarks.contenders import Cost, checkpoints, drop_cache, measure, table, take_turns

MERGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    base, steps = checkpoints(folder)
    expand = [sys.executable, "-m", "upit", "expand", "--base", base, "--num_experts", len(steps) + MERGES]
    expand += ["--experts", json.dumps([str(step) for step in steps]), "--output", folder / "expanded"]

    def ours() -> Cost:
        whole = measure(expand, folder / "expanded")
        return Cost(whole.seconds / MERGES, whole.peak_mb)

    contenders = {"upit expand, per merge": ours}
    if options.mergekit:
        parents = [{"model": str(step), "parameters": {"weight": 0.5, "density": 0.8}} for step in steps[:2]]
        config = {"merge_method": "dare_linear", "base_model": str(base), "models": parents, "dtype": "bfloat16"}
        (folder / "merge.yaml").write_text(json.dumps(config))
        merge = [options.mergekit / "bin/mergekit-yaml", folder / "merge.yaml", folder / "merged"]
        contenders["mergekit dare_linear"] = lambda: measure(merge, folder / "merged")
    costs = take_turns(contenders, options.rounds, lambda: drop_cache([base, *steps]))
    print(table(costs, list(contenders)[-1]))


if __name__ == "__main__":
    main()
