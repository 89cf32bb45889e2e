"""A training step of a mixture of experts beside transformers' Qwen3Moe of the same weights, and beside a dense model
of ours with as many active parameters, turn about, with the same threads. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.experts
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.beside_transformers import loaded, print_table, require_equal_losses, step_of, timed
from benchmarks.encoder_decoder import padded
from benchmarks.generate import Side
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.optim import OptimConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.parameters import parameters
from megarl.models.flops import idle_weights
from megarl.models.roles import Role
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Rows


@dataclass(frozen=True)
class Case:
    """A Qwen3-MoE whose tokens are each computed by `chosen` of `count` experts, and `rows` sequences of `time`
    tokens, or of between half as many and these where they are `ragged`."""

    layers: int
    width: int
    heads: int
    expert: int
    count: int
    chosen: int
    vocab_size: int
    rows: int
    time: int
    ragged: bool = True

    @property
    def name(self) -> str:
        size = f"{self.layers}L x {self.width}, {self.chosen} of {self.count} experts x {self.expert}"
        length = f"to {self.time}" if self.ragged else f"{self.time}"
        return f"{size}, vocab {self.vocab_size}, {self.rows} x {length}"

    @property
    def sequences(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        shortest = self.time // 2 if self.ragged else self.time
        lengths = torch.randint(shortest, self.time + 1, (self.rows,), generator=generator).tolist()
        return [torch.randint(1, self.vocab_size, (length,), generator=generator).tolist() for length in lengths]


CASES = {
    "small": Case(4, 128, 4, 96, 8, 2, 512, rows=32, time=64),
    "medium": Case(6, 384, 6, 256, 8, 2, 1024, rows=16, time=128),
    "even": Case(6, 384, 6, 256, 8, 2, 1024, rows=16, time=128, ragged=False),
    "tiny": Case(2, 32, 4, 16, 4, 2, 23, rows=4, time=8),  # for the test of this script
}
HEADER = [
    "model and rows",
    "beside",
    "theirs s",
    "megarl s",
    "ratio (wall)",
    "ratio (CPU)",
    "ratio (CPU per parameter)",
]


def their_step(model: Any, case: Case) -> float:
    """Forward and backward of cross entropy, padded to the longest row, as transformers batches."""
    tokens = padded(case.sequences)
    mask = padded([[1] * len(sequence) for sequence in case.sequences])
    model.zero_grad()
    loss = model(input_ids=tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    loss.backward()
    return float(loss.detach())


def our_step(engine: Engine, case: Case) -> float:
    """The same loss and gradients, with rows packed into shared bins."""
    tokens = padded(case.sequences)
    lengths = torch.tensor([len(sequence) for sequence in case.sequences])
    mask = (torch.arange(tokens.shape[1]) < lengths[:, None]).float()
    mask[:, 0] = 0.0
    rows = Rows(tokens, lengths, mask)
    batch = make_microbatches(rows, torch.arange(case.rows), engine, per_microbatch=case.rows, share_bins=True)
    return engine.train_step(batch, cross_entropy, count_targets)["loss"]


def random_model(case: Case) -> Any:
    """Return transformers' model of a case, with random weights."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=case.vocab_size,
        hidden_size=case.width,
        head_dim=case.width // case.heads,
        moe_intermediate_size=case.expert,
        intermediate_size=case.expert,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.heads,
        num_experts=case.count,
        num_experts_per_tok=case.chosen,
        norm_topk_prob=True,
        max_position_embeddings=case.time,
    )
    return Qwen3MoeForCausalLM(config)


def active(model: ModelConfig, vocab_size: int) -> int:
    """Return how many parameters compute a token."""
    total = sum(int(torch.Size(shape).numel()) for shape in parameters(model, vocab_size).values())
    return total - idle_weights(model)


def compare(case: Case, grid: Grid, seconds: float) -> list[list[str]]:
    """The lines of the table of a case: beside transformers, and beside our dense model."""
    model = random_model(case)
    engine, source = loaded(model, grid)
    require_equal_losses(our_step(engine, case), their_step(model, case))
    shape = vars(source.model) | {"experts": None, "ffn_size": case.chosen * case.expert}
    plain = ModelConfig(**shape)
    dense = build_engine(
        Role("policy", plain, case.vocab_size, optim=OptimConfig()), grid, ParallelConfig(), precision="fp32", seed=1
    )
    beside = {
        "transformers' Qwen3Moe": (lambda: their_step(model, case), 1.0),
        "a dense model of ours": (
            lambda: our_step(dense, case),
            active(source.model, case.vocab_size) / active(plain, case.vocab_size),
        ),
    }
    lines = []
    for name, (step, share) in beside.items():
        sides = step_of(step), step_of(lambda: our_step(engine, case))
        lines.append([case.name, name, *_measured(sides, seconds, share)])
    return lines


def _measured(sides: tuple[Side, Side], seconds: float, share: float) -> list[str]:
    """`share` is how many parameters of ours are active for one of theirs."""
    wall, cpu = timed(sides, seconds)
    ratio = cpu[0] / cpu[1]
    return [f"{wall[0]:.3f}", f"{wall[1]:.3f}", f"{wall[0] / wall[1]:.2f}", f"{ratio:.2f}", f"{ratio * share:.2f}"]


def main(argv: Sequence[str] | None = None) -> int:
    return print_table(__doc__, HEADER, CASES, ["small", "medium", "even"], compare, argv)


if __name__ == "__main__":
    sys.exit(main())
