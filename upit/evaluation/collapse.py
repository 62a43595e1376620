"""Whether a router has collapsed: experts that get next to nothing, or a layer that uses only a few."""

from torch import Tensor

from upit.evaluation.metrics import load, load_entropy


def balance_of(counts_DE: Tensor) -> tuple[Tensor, Tensor]:
    """Load of each expert over an even one, (D, E), and entropy of each layer's load over an even one's, (D,)."""
    return load(counts_DE[..., None]), load_entropy(counts_DE[..., None])


def collapsed(share_DE: Tensor, entropy_D: Tensor, *, min_share: float, min_entropy: float) -> list[str]:
    """What is out of bounds, one line a layer in plain words; empty where all is well."""
    lines = []
    for layer, (share_E, entropy) in enumerate(zip(share_DE, entropy_D.tolist(), strict=True)):
        starved = (share_E < min_share).nonzero().flatten().tolist()
        if starved or entropy < min_entropy:
            lines.append(f"layer {layer}: load entropy {entropy:.2f}, experts {starved} below {min_share:g} of even")
    return lines
