"""Apex's interface on the CPU: norms and optimizers, as built without `fast_layer_norm`."""

from . import normalization, optimizers

__all__ = ["normalization", "optimizers"]
