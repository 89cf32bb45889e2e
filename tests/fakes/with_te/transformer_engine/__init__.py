"""Transformer Engine's interface on the CPU."""

from importlib.metadata import version

from . import common, pytorch

__all__ = ["common", "pytorch"]
# The newest that Megatron 0.16 admits, or the one that 0.19 is built with.
__version__ = "2.11.0" if version("megatron-core").startswith("0.16.") else "2.17.1"
