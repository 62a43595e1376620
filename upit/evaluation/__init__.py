"""Held-out scores, routing, and metrics of both."""
