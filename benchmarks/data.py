"""Preparing data and the first batch, beside `datasets.map(num_proc=2)` of the same work.

    python -m benchmarks.data                      # 20,000 and 200,000 conversations
    python -m benchmarks.data --examples 500000

Conversations of about 350 tokens from made-up text, a ByteLevel BPE of 8,192 tokens, ChatML. Every contender is a
process of its own. Memory is that of all its processes together: proportional set size (what is shared counts once),
sampled twice a second. A rank's or a worker's own memory is what is not backed by a file (RssAnon), with the libraries
imported, which take most of it. `datasets.map` tokenises in batches with the same function and writes Arrow files too;
it reads the same JSON lines with `load_dataset`. On a busy machine compare the seconds of CPU.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil

PREPARE = """
import sys, time
from datamodules import InstructionDataModule
file, tokenizer, cache, processes = sys.argv[1:]
data = InstructionDataModule(
    tokenizer=tokenizer, train_files=[file], max_length=2048, cache_dir=cache, num_processes=int(processes)
)
start = time.monotonic()
data.prepare_data()
print("RESULT", time.monotonic() - start, 0)
"""
MAP = """
import sys, time
from datasets import load_dataset
from transformers import AutoTokenizer
from datamodules.chat import encode_batch
file, tokenizer, cache, processes = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(tokenizer)
def encode(batch, indices):
    rows = [{"id": str(i), "domain": "d", "messages": m} for i, m in zip(indices, batch["messages"])]
    examples = encode_batch(tokenizer, rows, max_length=2048)
    return {key: [example[key] for example in examples] for key in examples[0]}
start = time.monotonic()
data = load_dataset("json", data_files=file, split="train", cache_dir=cache)
data.map(encode, batched=True, batch_size=256, with_indices=True, num_proc=int(processes),
         remove_columns=["messages"])
print("RESULT", time.monotonic() - start, 0)
"""
TRAIN = """
import sys, time, psutil
from pathlib import Path
from datamodules import InstructionDataModule
def own(pid="self"):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 2**20
file, tokenizer, cache, workers = sys.argv[1:]
data = InstructionDataModule(
    tokenizer=tokenizer, train_files=[file], max_length=2048, batch_size=8, cache_dir=cache, num_workers=int(workers)
)
before = own()
start = time.monotonic()
data.setup("fit")
batches = iter(data.train_dataloader())
next(batches)
first = time.monotonic() - start
for _ in range(300):
    next(batches)
most = max([own(), *(own(child.pid) for child in psutil.Process().children(recursive=True))])
tokens = int(data.train_set.lengths.sum())
fill = tokens / (len(data.rows) * 2048)
print("RESULT", first, most, before, fill, len(data.rows), (time.monotonic() - start - first) / 300)
"""


def make_data(folder: Path, count: int) -> Path:
    """JSON lines of ``count`` conversations, the same in every run."""
    file = folder / f"conversations_{count}.jsonl"
    if file.exists():
        return file
    draw = random.Random(0)
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "is", "ont", "ing")]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(20_000)]
    with file.open("w") as stream:
        for _ in range(count):
            size = min(1500, max(20, int(draw.lognormvariate(5.1, 0.5))))
            turns = [draw.choices(words, k=part) for part in (size // 3, size - size // 3)]
            messages = [
                {"role": role, "content": " ".join(turn)}
                for role, turn in zip(("user", "assistant"), turns, strict=True)
            ]
            stream.write(json.dumps({"messages": messages}) + "\n")
    return file


def make_tokenizer(folder: Path, file: Path) -> Path:
    """A BPE of the first conversations."""
    from datamodules.reasoning_gym import train_tokenizer

    with file.open() as stream:
        texts = [
            message["content"]
            for _, line in zip(range(2000), stream, strict=False)
            for message in json.loads(line)["messages"]
        ]
    train_tokenizer(texts, vocab_size=8192, chat_template=None).save_pretrained(folder / "tokenizer")
    return folder / "tokenizer"


def measure(script: str, *arguments: object) -> tuple[list[float], float, float]:
    """What a script's ``RESULT`` says, its processes' CPU seconds, and the peak of their memory together, GiB."""
    before = os.times()
    run = subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    process, peak = psutil.Process(run.pid), 0
    while run.poll() is None:
        used = 0
        with suppress(psutil.NoSuchProcess):
            for one in (process, *process.children(recursive=True)):
                used += one.memory_full_info().pss
        peak = max(peak, used)
        time.sleep(0.5)
    output = run.stdout.read() if run.stdout else ""
    if run.returncode:
        raise RuntimeError(f"a contender failed with {run.returncode}")
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    (line,) = (line for line in output.splitlines() if line.startswith("RESULT"))
    return [float(value) for value in line.split()[1:]], cpu, peak / 2**30


def one_size(folder: Path, count: int, only: list[str]) -> None:
    file = make_data(folder, count)
    tokenizer = make_tokenizer(folder, file)
    caches = {name: folder / f"cache_{count}_{name}_{os.getpid()}" for name in ("one", "two", "map")}
    seconds: dict[str, float] = {}
    print(
        f"\n{count:,} conversations, {file.stat().st_size / 2**20:.0f} MiB, load {os.getloadavg()[0]:.1f}", flush=True
    )
    contenders = {
        "two": ("upit, 2 processes", PREPARE, 2),
        "one": ("upit, 1 process", PREPARE, 1),
        "map": ("datasets.map(num_proc=2)", MAP, 2),
    }
    for name in only:
        label, script, processes = contenders[name]
        (seconds[name], *_), cpu, peak = measure(script, file, tokenizer, caches[name], processes)
        rate = count / seconds[name]
        print(
            f"| {label} | {seconds[name]:.1f} s | {rate:.0f} rows/s | {cpu:.1f} s of CPU | {peak:.2f} GiB |",
            flush=True,
        )
    print("times of upit's 2 processes:", {name: round(own / seconds["two"], 2) for name, own in seconds.items()})
    for workers in (0, 2):
        (first, most, before, fill, rows, batch), *_ = measure(TRAIN, file, tokenizer, caches["two"], workers)
        print(
            f"| {workers} workers | first batch {first:.1f} s | own memory {most:.2f} GiB, imports {before:.2f} | "
            f"{rows:.0f} rows, {fill:.1%} full | {batch * 1e3:.1f} ms a batch |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path(".cache/benchmarks"))
    parser.add_argument("--examples", type=int, nargs="+", default=[20_000, 200_000])
    parser.add_argument("--only", nargs="+", choices=["two", "one", "map"], default=["two", "one", "map"])
    options = parser.parse_args()
    folder = options.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for count in options.examples:
        one_size(folder, count, options.only)


if __name__ == "__main__":
    main()
