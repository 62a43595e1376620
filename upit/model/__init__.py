"""Dense models and MoEs: architectures, loading, forward pass, losses."""
