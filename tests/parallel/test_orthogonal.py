"""Orthogonalised matrices, beside their singular value decompositions."""

from __future__ import annotations

import pytest
import torch

from megarl.parallel.orthogonal import orthogonalise


@pytest.mark.parametrize("shape", [(64, 64), (32, 96), (96, 32), (1, 16), (16, 1)], ids=str)
def test_singular_vectors_stay_and_singular_values_become_about_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = u.t() @ orthogonalise(matrix).double() @ v.t()
    kept = found.diagonal()[s > 0.01 * s.max()]
    assert len(kept) >= 0.9 * min(shape)
    assert ((kept > 0.65) & (kept < 1.25)).all()
    assert (found - found.diagonal().diag()).abs().max() < 1e-4


def test_the_scale_does_not_count_and_zeros_stay() -> None:
    matrix = torch.randn(8, 12, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(orthogonalise(matrix * 1e-5), orthogonalise(matrix * 1e5), rtol=1e-5, atol=1e-6)
    assert not orthogonalise(torch.zeros(3, 4)).any()
