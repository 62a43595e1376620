"""UpIT: upcycling instruction tuning from dense to Mixture-of-Experts (arXiv:2410.01610)."""

__version__ = "0.1.0"
