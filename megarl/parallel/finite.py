"""Check tensors for NaN and infinity, with one read of each and without a copy."""

from torch import Tensor, aminmax, isfinite


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite. NaN propagates to the minimum and the maximum, so these are enough."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    smallest, largest = aminmax(tensor.detach())
    return bool(isfinite(smallest) & isfinite(largest))
