"""Orthogonalised matrices, beside their singular value decompositions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from megarl.parallel.grid import Grid, start_world
from megarl.parallel.initialise import local_slice
from megarl.parallel.layout import Layout
from megarl.parallel.orthogonal import Exchange, orthogonalise
from megarl.parallel.trained import Trained
from tests.worlds import Worlds


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


WHOLES = [torch.randn(shape, generator=torch.Generator().manual_seed(shape[0])) for shape in [(8, 6), (12, 4), (4, 10)]]
# Of each: the dimension that tensor-parallel ranks split, its blocks, and the values after which the second
# data-parallel rank follows. All ranks hold the last matrix whole, and the first of these updates nothing of it.
SPLITS = [(0, 2, 5), (1, 1, 20), (None, 1, 0)]


def exchanged() -> list[tuple[Tensor, Tensor]]:
    """This rank's slices of three matrices after an exchange, and what they must be."""
    grid = Grid(Layout.for_world(4, tp=2), start_world())
    matrices, given, wanted, found = [], {}, {}, {}
    for number, (whole, (dim, stride, border)) in enumerate(zip(WHOLES, SPLITS, strict=True)):
        like = nn.Parameter(whole if dim is None else torch.cat(whole.chunk(2, dim)[:1], dim))
        if dim is not None:
            like.tensor_model_parallel, like.partition_dim, like.partition_stride = True, dim, stride  # type: ignore[attr-defined]
        spans = (slice(0, border) if border else None, slice(border, like.numel()))
        matrix = Trained(f"decoder.layers.{number}.weight", like, spans, None, 0)
        matrices.append(matrix)
        if (span := spans[grid.dp_rank]) is not None:
            given[matrix], wanted[matrix] = (
                local_slice(full, like, grid.tp_rank, 2).reshape(-1)[span] for full in (whole, orthogonalise(whole))
            )
    Exchange(grid, matrices).orthogonalise(given.__getitem__, found.__setitem__)
    assert found.keys() == wanted.keys()
    grid.close()
    return [(found[matrix], wanted[matrix]) for matrix in found]


def test_every_rank_gets_its_slices_of_the_whole_orthogonalised_matrices(worlds: Worlds) -> None:
    ranks = worlds.run(4, exchanged)
    assert [len(slices) for slices in ranks] == [2, 2, 3, 3]
    for slices in ranks:
        for found, wanted in slices:
            torch.testing.assert_close(found, wanted)
