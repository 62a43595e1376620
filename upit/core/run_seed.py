"""The seed of a run."""

import os


def run_seed() -> int:
    """``seed_everything`` of this run, 0 without one. Read it when a run starts; a constructor may come before."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))
