"""The experts' matrix products, behind transformers' experts interface."""
