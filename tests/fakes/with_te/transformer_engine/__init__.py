"""Transformer Engine's interface on the CPU."""

from . import common, pytorch

__all__ = ["common", "pytorch"]
__version__ = "2.11.0"
