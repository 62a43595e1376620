"""Memory and time of the loss head, forward and backward: logits in chunks, computed again, beside all logits at once.

    python -m benchmarks.loss_head [--device cuda] [--tokens 4096]

SmolLM2's head, 576 x 49,152, under bf16 autocast. Each contender is a process of its own; memory is what its peak
(resident set; on GPUs, allocated) rises above that of the same process before the pass.

- ``chunks``: ours, ``upit.forward.HEAD_TOKENS`` tokens at a time.
- ``whole``: ``F.cross_entropy`` of all logits in float32, as transformers' causal language models compute it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time

HIDDEN, VOCABULARY, STEPS = 576, 49152, 3


def run(kind: str, device: str, tokens: int) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from upit.forward import chunked_head_losses

    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False).to(device)
    states_LH = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
    targets_L = torch.randint(VOCABULARY, (tokens,), device=device)
    head.weight.grad = torch.zeros_like(head.weight)

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            if kind == "chunks":
                loss = chunked_head_losses(head, states_LH, targets_L).mean()
            else:
                loss = F.cross_entropy(head(states_LH).float(), targets_L)
        loss.backward()

    before = peak()
    step()
    rise = peak() - before
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return {"seconds": (time.perf_counter() - start) / STEPS, "mb": rise}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tokens", type=int, default=4096, help="response tokens")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print(json.dumps(run(options.run, options.device, options.tokens)))
        return
    print(f"{options.device}, {options.tokens} tokens\n| | rise of the peak, MB | seconds |\n|---|---|---|")
    for kind in ("chunks", "whole"):
        command = [sys.executable, "-m", "benchmarks.loss_head", "--run", kind, "--device", options.device]
        command += ["--tokens", str(options.tokens)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {kind} | {found['mb']:.0f} | {found['seconds']:.2f} |")


if __name__ == "__main__":
    main()
