"""RMSNorm on a CPU has its own backward pass: results and gradients are those of torch's single operations."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from megarl.models.norm import RMSNorm
from megarl.parallel.fake import fake_world
from megarl.parallel.layout import Layout

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rms_norm_and_its_gradients_are_those_of_torch(dtype: torch.dtype, trains: bool) -> None:
    config = SimpleNamespace(params_dtype=dtype, sequence_parallel=False)
    with fake_world(Layout(), device="cpu"):
        norm = RMSNorm(config, 16, eps=1e-3)
    norm.weight.data.normal_()
    norm.weight.requires_grad_(trains)
    x = torch.randn(7, 3, 16, dtype=dtype, requires_grad=True)
    inputs = [x, norm.weight] if trains else [x]
    upstream, tolerance = torch.randn(x.shape, dtype=dtype), TOLERANCES[dtype]
    wanted = F.rms_norm(x, (16,), norm.weight, 1e-3)
    torch.testing.assert_close(norm(x), wanted, rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), wanted, rtol=tolerance, atol=tolerance)
    found, gradients = (torch.autograd.grad(result, inputs, upstream) for result in (norm(x), wanted))
    torch.testing.assert_close(found, gradients, rtol=tolerance, atol=tolerance)
