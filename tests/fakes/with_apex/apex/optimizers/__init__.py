from .fused_adam import FusedAdam


class FusedSGD:
    """A name that Megatron imports."""


__all__ = ["FusedAdam", "FusedSGD"]
