"""Which examples are held out, and which are trained on and how often: arrays of places, no example is read."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


def domain_name(name: str) -> str:
    """A domain's name as it stands in tags of metrics, of which a slash would begin another group."""
    return name.replace("/", "_")


class Split(NamedTuple):
    """Places of the training and the held-out examples, sorted, and how many are in neither."""

    train: np.ndarray
    heldout: np.ndarray
    copies: int  # of held-out conversations, left out of training
    cut: int  # held-out examples longer than max_length: no answer to them can be right


def split_given(conversations: np.ndarray, *, heldout: np.ndarray, cut: np.ndarray) -> Split:
    """Training and held-out examples that were given apart.

    Args:
        conversations: digest of each example's conversation.
        heldout: whether it was given as held out.
        cut: whether it is longer than max_length.
    """
    kept = np.flatnonzero(heldout & ~cut)
    copied = ~heldout & np.isin(conversations, conversations[kept])
    return Split(np.flatnonzero(~heldout & ~copied), kept, int(copied.sum()), int((heldout & cut).sum()))


def split_by_content(
    conversations: np.ndarray,
    domains: np.ndarray,
    domain_names: Sequence[str],
    *,
    cut: np.ndarray,
    further: np.ndarray,
    fraction: float,
    seed: int,
) -> Split:
    """Hold out a part of each domain's conversations, with all their copies.

    At least one conversation a domain, and never the only one. Conversations with an example that was cut are trained
    on.

    Args:
        domains: index of each example's domain in ``domain_names``.
        further: whether an example is of the same conversation as the one before it.
        fraction: of each domain's conversations.
    """
    cut_ones = conversations[cut]
    chosen: list[int] = []
    for name in sorted(domain_names):
        own = np.flatnonzero(domains == domain_names.index(name))
        _, first = np.unique(conversations[own], return_index=True)
        places = own[np.sort(first)]
        places = places[~np.isin(conversations[places], cut_ones)]
        count = min(max(1, round(fraction * len(first))), len(first) - 1, len(places))
        chosen += random.Random(seed).sample(places.tolist(), count)
    heldout = set(chosen)
    for place in sorted(chosen):  # of a conversation that became several examples, all
        while place + 1 < len(further) and further[place + 1]:
            heldout.add(place := place + 1)
    places = np.array(sorted(heldout), np.int64)
    # of copies, one a domain
    taken = np.isin(conversations, conversations[places])
    return Split(np.flatnonzero(~taken), places, int(taken.sum()) - len(places), 0)


def chosen_examples(
    domains: np.ndarray,
    domain_names: Sequence[str],
    *,
    weights: Mapping[str, float],
    caps: Mapping[str, int],
    seed: int,
) -> np.ndarray:
    """Places of the examples of one epoch, sorted; a place stands there as often as it is trained on.

    Args:
        weights: how often a domain's examples are trained on in an epoch, default 1. Of 2.5, each twice, and a random
            half once more.
        caps: most examples of a domain in an epoch.
    """
    parts = []
    for index, name in enumerate(domain_names):
        own = np.flatnonzero(domains == index)
        generator = np.random.default_rng([seed, index])
        weight = weights.get(name, 1.0)
        whole, rest = int(weight), round((weight - int(weight)) * len(own))
        taken = np.concatenate([np.repeat(own, whole), generator.permutation(own)[:rest]])
        if len(taken) > (most := caps.get(name, len(taken))):
            taken = generator.permutation(taken)[:most]
        parts.append(taken)
    return np.sort(np.concatenate(parts))
