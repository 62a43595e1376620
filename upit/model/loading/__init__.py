"""Models, configs, tokenizers and checkpoints, read from disk or made from scratch."""
