"""Whether tensors hold NaN or infinity, in one read of each and without a copy."""

from torch import Tensor, aminmax, isfinite


def is_finite(tensor: Tensor) -> bool:
    """Whether every value is a finite number. NaN goes through to the smallest and the largest value."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    smallest, largest = aminmax(tensor.detach())
    return bool(isfinite(smallest) & isfinite(largest))
