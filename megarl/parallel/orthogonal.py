"""Orthogonalised updates of whole matrices, whose slices are spread over tensor- and data-parallel ranks.

The ranks that hold the layers of one pipeline stage form a group. In each round, every rank of the group collects the
slices of one matrix, orthogonalises it, and sends the slices of the result back:

                    rank 0          rank 1          rank 2          rank 3        (TP2 x DP2)
    slices of       A B C D         A B C D         A B C D         A B C D
    all to all      A A A A         B B B B         C C C C         D D D D
    orthogonal      A               B               C               D
    all to all      A B C D         A B C D         A B C D         A B C D

No matrix is orthogonalised twice, and a rank needs memory for one whole matrix at a time.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, join_slices, local_slice
from megarl.parallel.shards import EXPERTS
from megarl.parallel.trained import Trained

COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration (Jordan et al., 2024)
STEPS = 5
EPS = 1e-7  # a smaller matrix is not scaled up to norm 1


def orthogonalise(matrix: Tensor) -> Tensor:
    """Return U V^T of the singular value decomposition U S V^T, approximately, by Newton-Schulz iterations in float32.

    The iterations map the singular values towards 1 and end between about 0.7 and 1.2. The published code computes in
    bfloat16; float32 keeps results independent of the layout.
    """
    a, b, c = COEFFICIENTS
    rows, columns = matrix.shape
    x = matrix.t() if rows > columns else matrix
    x = x / x.norm().clamp(min=EPS)
    for _ in range(STEPS):
        gram = x @ x.t()
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.t() if rows > columns else x


class Exchange:
    """Orthogonalises whole matrices, of which every rank of a pipeline stage has slices."""

    def __init__(self, grid: Grid, matrices: Sequence[Trained]) -> None:
        self.tp, self.device = grid.layout.tp, grid.device
        # Tensor-parallel ranks vary fastest in both. An optimizer trains either experts or all else.
        of_experts = any(EXPERTS in matrix.name for matrix in matrices)
        self.group: dist.ProcessGroup = grid.tp_expt_dp if of_experts else grid.groups.tp_dp_cp
        self.size, self.rank = self.group.size(), self.group.rank()
        largest_first = sorted(matrices, key=lambda matrix: -matrix.parameter.numel())
        self.rounds = [largest_first[at : at + self.size] for at in range(0, len(matrices), self.size)]

    def orthogonalise(self, slice_of: Callable[[Trained], Tensor], apply: Callable[[Trained, Tensor], None]) -> None:
        """Orthogonalise all matrices; all ranks call this together.

        Args:
            slice_of: returns this rank's slice [n] of a matrix; called in the matrix's round.
            apply: called with a matrix and this rank's slice [n] of the orthogonalised one.
        """
        for matrices in self.rounds:
            self._round(matrices, slice_of, apply)

    def _round(
        self, matrices: list[Trained], slice_of: Callable[[Trained], Tensor], apply: Callable[[Trained, Tensor], None]
    ) -> None:
        """Orthogonalise a matrix on each rank."""
        whole = self._collect(matrices, slice_of)
        cut = [] if whole is None else self._cut(matrices[self.rank], orthogonalise(whole))
        del whole
        returned = self._swap(cut, [_length(self._updated(matrix, self.rank)) for matrix in matrices])
        for matrix, piece in zip(matrices, returned, strict=False):  # the ranks after those with a matrix sent none
            if len(piece):
                apply(matrix, piece)

    @property
    def peak_bytes(self) -> int:
        """The most memory that is needed at once: three copies of a whole matrix, and two products of it with itself
        transposed."""
        shapes = [matrix.whole_shape(self.tp) for matrices in self.rounds for matrix in matrices]
        return max((4 * (3 * rows * columns + 2 * min(rows, columns) ** 2) for rows, columns in shapes), default=0)

    def _collect(self, matrices: list[Trained], slice_of: Callable[[Trained], Tensor]) -> Tensor | None:
        """Return this rank's matrix of a round, joined from the slices of all ranks; None if it has none."""
        mine = matrices[self.rank] if self.rank < len(matrices) else None
        given = [
            slice_of(matrix) if _length(self._collected(matrix, self.rank)) else self._nothing() for matrix in matrices
        ]
        lengths = [_length(self._collected(mine, rank)) if mine else 0 for rank in range(self.size)]
        pieces = self._swap(given, lengths)
        del given
        return None if mine is None else self._joined(mine, pieces)

    def _updated(self, matrix: Trained, rank: int) -> slice | None:
        """Return the span of the flat slice that a rank of the group updates."""
        return matrix.spans[rank // self.tp]

    def _collected(self, matrix: Trained, rank: int) -> slice | None:
        """Return the span of the flat slice that a rank sends. Of a matrix that all tensor-parallel ranks hold whole,
        the first of them sends its copy."""
        needed = is_sharded(matrix.parameter) or rank % self.tp == 0
        return self._updated(matrix, rank) if needed else None

    def _nothing(self) -> Tensor:
        return torch.empty(0, device=self.device)

    def _swap(self, sent: list[Tensor], lengths: list[int]) -> list[Tensor]:
        """Send `sent[i]` [n] to rank i, and return what each rank sent, `lengths[i]` values. Both lists may end early,
        where no values follow."""
        if self.size == 1:
            return sent
        sizes = [len(piece) for piece in sent]
        sizes, lengths = ([*counts, *[0] * (self.size - len(counts))] for counts in (sizes, lengths))
        received = torch.empty(sum(lengths), device=self.device)
        dist.all_to_all_single(received, torch.cat([self._nothing(), *sent]), lengths, sizes, group=self.group)
        return list(received.split(lengths))

    def _joined(self, matrix: Trained, pieces: list[Tensor]) -> Tensor:
        """Join the slices of all ranks to the whole matrix."""
        parameter = matrix.parameter
        if not is_sharded(parameter):
            return torch.cat(pieces).view(parameter.shape)
        slices = [torch.cat(pieces[rank :: self.tp]).view(parameter.shape) for rank in range(self.tp)]
        return join_slices(slices, parameter)

    def _cut(self, matrix: Trained, whole: Tensor) -> list[Tensor]:
        """Return the slices of a whole matrix that the ranks update."""
        flat = [local_slice(whole, matrix.parameter, rank, self.tp).reshape(-1) for rank in range(self.tp)]
        spans = [self._updated(matrix, rank) for rank in range(self.size)]
        return [flat[rank % self.tp][span] if span else self._nothing() for rank, span in enumerate(spans)]


def _length(span: slice | None) -> int:
    return 0 if span is None else int(span.stop - span.start)
