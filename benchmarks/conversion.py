"""Conversion: 8 checkpoints of SmolLM2-135M's shape to a MoE, beside mergekit-moe, MixtureKit, and plain copying.

    python -m benchmarks.conversion --mergekit VENV --mixturekit VENV

VENV is a virtual environment with that package; leave one out to do without it. Plain: read the 8 weight files from
end to end, write as many bytes as the MoE has. Every contender starts with the inputs on the disk, not in memory, and
its time ends with the output on the disk. The result is held against mergekit's, tensor by tensor. Starting: what
every Python program that knows a Llama's config spends before its first byte.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from benchmarks.contenders import checkpoints, drop_cache, measure, table, take_turns

PLAIN = """
import os, sys
from pathlib import Path
buffer = bytearray(1 << 24)
output, size, *inputs = sys.argv[1:]
for file in inputs:
    with open(file, "rb", buffering=0) as stream:
        while stream.readinto(buffer):
            pass
Path(output).mkdir()
with open(output + "/bytes", "wb", buffering=0) as stream:
    for _ in range(int(size) // len(buffer)):
        stream.write(buffer)
"""
UPIT = [sys.executable, "-m", "upit", "upcycle"]
SAME = """
import sys, torch
from transformers import AutoModelForCausalLM
ours, theirs = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in sys.argv[1:])
assert ours.keys() == theirs.keys()
for name in theirs:
    assert name.endswith("gate.weight") or torch.equal(ours[name], theirs[name]), name
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--mergekit", type=Path)
    parser.add_argument("--mixturekit", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    base, steps = checkpoints(folder)
    output = {name: folder / name for name in ("plain", "upit", "mergekit", "mixturekit")}
    size = 1_384_104_736

    commands: dict[str, tuple[str, list]] = {
        "plain": (
            "plain reading and writing",
            [sys.executable, "-c", PLAIN, output["plain"], size, *(step / "model.safetensors" for step in steps)],
        ),
        "upit": (
            "upit upcycle",
            [
                *UPIT,
                "--base",
                base,
                "--experts",
                json.dumps([str(step) for step in steps]),
                "--output",
                output["upit"],
            ],
        ),
    }
    if options.mergekit:
        config = {"base_model": str(base), "gate_mode": "random", "dtype": "bfloat16", "architecture": "mixtral"}
        config["experts"] = [{"source_model": str(step), "positive_prompts": [""]} for step in steps]
        (folder / "mergekit.yaml").write_text(json.dumps(config))
        tool = options.mergekit / "bin/mergekit-moe"
        commands["mergekit"] = ("mergekit-moe", [tool, folder / "mergekit.yaml", output["mergekit"]])
    if options.mixturekit:
        config = {"moe_method": "traditional", "model_type": "llamamoe8x", "num_experts_per_tok": 2, "alpha": 0}
        config["experts"] = [{"expert_name": step.name, "model_id": str(step)} for step in steps]
        (folder / "mixturekit.yaml").write_text(json.dumps(config))
        tool = options.mixturekit / "bin/mixturekit"
        build = [tool, "build", folder / "mixturekit.yaml", "--output", output["mixturekit"]]
        commands["mixturekit"] = ("MixtureKit build", build)
    start = [sys.executable, "-c", "from transformers import LlamaConfig"]
    commands["start"] = ("starting (importing LlamaConfig)", start)
    output["start"] = folder / "start"
    contenders = {
        title: (lambda command=command, own=output[name]: measure(command, own))
        for name, (title, command) in commands.items()
    }
    costs = take_turns(contenders, options.rounds, lambda: drop_cache([base, *steps]))
    print(table(costs, "plain reading and writing"))
    if options.mergekit:
        subprocess.run([sys.executable, "-c", SAME, output["upit"], output["mergekit"]], check=True)
        print("Every tensor but the routers is identical to mergekit-moe's.")


if __name__ == "__main__":
    main()
