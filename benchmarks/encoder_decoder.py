"""A training step and generation of an encoder-decoder beside transformers' T5 of the same weights, turn about, greedy,
with the same threads: ragged prompts and responses. Prints one table.

    OMP_NUM_THREADS=1 python -m benchmarks.encoder_decoder
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.beside_transformers import loaded, print_table, require_equal_losses, step_of, timed
from benchmarks.generate import NO_EOS, Side
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Rows
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling


@dataclass(frozen=True)
class Case:
    """A T5 1.1 with `layers` in each part, and `rows` prompts and responses, each between half as long and whole."""

    layers: int
    width: int
    heads: int
    vocab_size: int
    rows: int
    prompt: int
    response: int

    @property
    def name(self) -> str:
        size = f"{self.layers} + {self.layers}L x {self.width}, vocab {self.vocab_size}"
        return f"{size}, {self.rows} x (to {self.prompt} + to {self.response})"

    @property
    def pairs(self) -> list[tuple[list[int], list[int]]]:
        generator = torch.Generator().manual_seed(0)

        def tokens(longest: int, shortest: int) -> list[int]:
            length = int(torch.randint(shortest, longest + 1, (), generator=generator))
            return torch.randint(2, self.vocab_size, (length,), generator=generator).tolist()

        return [(tokens(self.prompt, self.prompt // 2), tokens(self.response, 2)) for _ in range(self.rows)]


CASES = {
    "small": Case(4, 128, 4, 512, rows=32, prompt=32, response=32),
    "medium": Case(6, 384, 6, 1024, rows=16, prompt=96, response=64),
    "tiny": Case(2, 32, 4, 23, rows=4, prompt=6, response=6),  # for the test of this script
}
HEADER = ["model and rows", "what", "transformers s", "megarl s", "ratio (wall)", "ratio (CPU)"]


def padded(sequences: Sequence[list[int]], value: int = 0) -> Tensor:
    return pad_sequence([torch.tensor(tokens) for tokens in sequences], batch_first=True, padding_value=value)


def their_step(model: Any, case: Case) -> float:
    """Forward and backward of cross entropy, padded to the longest row, as transformers batches."""
    prompts, responses = zip(*case.pairs, strict=True)
    read = padded(prompts)
    mask = padded([[1] * len(prompt) for prompt in prompts])
    model.zero_grad()
    loss = model(input_ids=read, attention_mask=mask, labels=padded(responses, -100)).loss
    loss.backward()
    return float(loss)


def our_step(engine: Engine, case: Case) -> float:
    """The same loss and gradients, with rows packed into shared bins."""
    tokens = padded([prompt + response for prompt, response in case.pairs])
    masks = padded([[0] * len(prompt) + [1] * len(response) for prompt, response in case.pairs]).float()
    lengths = torch.tensor([len(prompt) + len(response) for prompt, response in case.pairs])
    rows = Rows(tokens, lengths, masks)
    batch = make_microbatches(rows, torch.arange(case.rows), engine, per_microbatch=case.rows, share_bins=True)
    return engine.train_step(batch, cross_entropy, count_targets)["loss"]


def their_answers(model: Any, case: Case) -> list[list[int]]:
    """`generate` pads finished rows until the longest is done: that is how it batches."""
    import transformers

    prompts, responses = zip(*case.pairs, strict=True)
    wanted = torch.tensor([len(response) for response in responses])

    class RowLengths(transformers.StoppingCriteria):  # type: ignore[misc]
        def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            return input_ids.shape[1] - 1 >= wanted

    with torch.no_grad():
        found = model.generate(
            padded(prompts),
            attention_mask=padded([[1] * len(prompt) for prompt in prompts]),
            do_sample=False,
            max_new_tokens=int(wanted.max()),
            eos_token_id=None,
            pad_token_id=0,
            stopping_criteria=transformers.StoppingCriteriaList([RowLengths()]),
        )
    return [row[1 : 1 + length] for row, length in zip(found.tolist(), wanted.tolist(), strict=True)]


def our_answers(generator: Generator, case: Case) -> list[list[int]]:
    requests = [
        Request(row, 0, tuple(prompt), Sampling(temperature=0.0, max_new_tokens=len(response)))
        for row, (prompt, response) in enumerate(case.pairs)
    ]
    return [list(rollout.response) for rollout in generator.generate(requests)]


def random_model(case: Case) -> Any:
    """Return transformers' model of a case, with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    config = T5Config(
        vocab_size=case.vocab_size,
        d_model=case.width,
        d_kv=case.width // case.heads,
        d_ff=2 * case.width,
        num_layers=case.layers,
        num_heads=case.heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def compare(case: Case, grid: Grid, seconds: float) -> list[list[str]]:
    """The lines of the table of a case: a training step, and generation."""
    model = random_model(case)
    engine, _ = loaded(model, grid)
    require_equal_losses(our_step(engine, case), their_step(model, case))
    generator = Generator(engine, NO_EOS, seed=1, limits=Limits(slots=case.rows))
    model.eval()
    if our_answers(generator, case) != their_answers(model, case):
        sys.exit("the greedy tokens differ")
    model.train()
    steps = step_of(lambda: their_step(model, case)), step_of(lambda: our_step(engine, case))
    answers = Side(lambda: their_answers(model, case), [], []), Side(lambda: our_answers(generator, case), [], [])
    return [_line(case, what, sides, seconds) for what, sides in (("training step", steps), ("generation", answers))]


def _line(case: Case, what: str, sides: tuple[Side, Side], seconds: float) -> list[str]:
    wall, cpu = timed(sides, seconds)
    return [
        case.name,
        what,
        f"{wall[0]:.3f}",
        f"{wall[1]:.3f}",
        f"{wall[0] / wall[1]:.2f}",
        f"{cpu[0] / cpu[1]:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    return print_table(__doc__, HEADER, CASES, ["small", "medium"], compare, argv)


if __name__ == "__main__":
    sys.exit(main())
