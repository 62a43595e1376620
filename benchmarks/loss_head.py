"""Memory and time of the loss head, forward and backward: logits in chunks, computed again, beside all logits at once.

    python -m benchmarks.loss_head [--device cuda] [--tokens 4096]

SmolLM2's head, 576 x 49,152, under bf16 autocast. Each contender is a process of its own; memory is what its peak
(resident set; on GPUs, allocated) rises above that of the same process before the pass.

- ``ours``: what training uses, ``upit.model.loss_head.HEAD_TOKENS`` tokens at a time; on GPUs the gradients come with
  the loss.
- ``chunks``: the same chunks, their logits computed again in the backward pass; on CPUs what training uses.
- ``liger``: ``LigerFusedLinearCrossEntropyLoss`` of liger-kernel (GPU only, where it is installed).
- ``whole``: ``F.cross_entropy`` of all logits in float32, as transformers' causal language models compute it.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from importlib.util import find_spec

HIDDEN, VOCABULARY, STEPS = 576, 49152, 3


def run(kind: str, device: str, tokens: int) -> dict[str, float]:
    import torch
    import torch.nn.functional as F

    from upit.model.loss_head import head_loss, head_losses

    torch.manual_seed(0)
    head = torch.nn.Linear(HIDDEN, VOCABULARY, bias=False).to(device)
    states_LH = torch.randn(tokens, HIDDEN, device=device, requires_grad=True)
    targets_L = torch.randint(VOCABULARY, (tokens,), device=device)
    head.weight.grad = torch.zeros_like(head.weight)
    if kind == "liger":
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()

    def peak() -> float:
        if device == "cuda":
            return torch.cuda.max_memory_allocated() / 1e6
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3

    def step() -> None:
        with torch.autocast(device, torch.bfloat16):
            if kind == "ours":
                loss = head_loss(head, states_LH, targets_L) / tokens
            elif kind == "chunks":
                loss = head_losses(head, states_LH, targets_L).mean()
            elif kind == "liger":
                loss = liger(head.weight, states_LH.to(torch.bfloat16), targets_L)
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
    print(f"{options.device}, {options.tokens} tokens\n| | rise of the peak, MB | ms |\n|---|---|---|")
    kinds = ["ours", "chunks", "whole"]
    if options.device == "cuda" and find_spec("liger_kernel"):
        kinds.append("liger")
    for kind in kinds:
        command = [sys.executable, "-m", "benchmarks.loss_head", "--run", kind, "--device", options.device]
        command += ["--tokens", str(options.tokens)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"| {kind} | {found['mb']:.0f} | {1000 * found['seconds']:.1f} |")


if __name__ == "__main__":
    main()
