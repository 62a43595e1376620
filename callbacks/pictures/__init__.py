"""Callbacks that draw: each hands a run's pictures to TensorBoard."""
