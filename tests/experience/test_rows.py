"""Rollouts become rows, and forward passes over shared bins compute and train what passes over whole rows do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.experience.rows import forward_rows, rollouts_to_rows, training_flops
from megarl.models.flops import flops_per_token
from megarl.models.gpt import GPT
from megarl.parallel.engine import Outputs
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch
from megarl.rollout.requests import Rollout
from tests.parallel.engines import VOCAB, small_engine
from tests.worlds import Worlds


def rollouts(*lengths: tuple[int, int]) -> list[Rollout]:
    """Of (prompt, response) tokens; every token of a row is different, and none is 0."""
    made = []
    for row, (prompt, response) in enumerate(lengths):
        tokens = [(7 * row + place) % (VOCAB - 1) + 1 for place in range(prompt + response)]
        logprobs = [-float(place) - row for place in range(response)]
        made.append(Rollout(row, 0, tokens[:prompt], tokens[prompt:], logprobs, "length"))
    return made


UNEQUAL = rollouts_to_rows(rollouts((1, 9), (2, 1), (1, 4), (3, 3), (1, 1), (5, 5), (1, 2)))


def test_rows_of_rollouts_by_hand() -> None:
    """The end of sequence is an action like any other, also where it is the padding's id."""
    rows = rollouts_to_rows(
        [
            Rollout(4, 0, [5], [6, 0], [-0.5, -0.25], "eos", weights_version=3),
            Rollout(4, 1, [7, 8], [1], [-1.0], "length", weights_version=2),
        ]
    )
    assert rows.tokens.tolist() == [[5, 6, 0], [7, 8, 1]]
    assert rows.action_mask.tolist() == [[0, 1, 1], [0, 0, 1]]
    assert rows["rollout_logprobs"].tolist() == [[0, -0.5, -0.25], [0, 0, -1.0]]
    assert rows.lengths.tolist() == [3, 3]
    assert rows["group"].tolist() == [4, 4]
    assert rows["truncated"].tolist() == [False, True]
    assert rows["weights_version"].tolist() == [3, 2]


def test_operations_of_rows_leave_out_what_is_not_read() -> None:
    model = ModelConfig(num_layers=2, hidden_size=16, num_heads=2)
    three_and_one = training_flops(model, 10, torch.tensor([4, 2]))
    assert three_and_one == pytest.approx(4 * flops_per_token(model, 10, 2.5))


def outputs(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
    logprobs = model.logprobs(hidden, batch.targets, batch.target_mask).logprobs
    return {"logprobs": logprobs, "values": model.values(hidden)}


def computed(share_bins: bool, model: dict[str, Any]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Log-probs, values, and gradients of their sum, of a small model with a value head."""
    engine = small_engine({}, model, value_head=True)

    def loss(model: GPT, hidden: Tensor, batch: Microbatch, counts: dict[str, float]) -> tuple[Tensor, Outputs]:
        found, mask = outputs(model, hidden, batch), batch.rows.action_mask
        logprobs, values = batch.gather_rows(found["logprobs"]), batch.gather_rows(found["values"])
        total = ((logprobs * batch.rows["rollout_logprobs"] + values) * mask).sum() / counts["tokens"]
        return total, {"loss": total}

    found = forward_rows(engine, UNEQUAL, outputs, per_microbatch=2, share_bins=share_bins)
    microbatches = make_microbatches(
        UNEQUAL, torch.arange(len(UNEQUAL)), engine, per_microbatch=2, share_bins=share_bins
    )
    engine.train_step(microbatches, loss, lambda batch: {"tokens": batch.target_mask.sum()})
    gradients = {name: parameter.main_grad.clone() for name, parameter in engine.parameters()}
    engine.grid.close()
    return found["logprobs"] * UNEQUAL.action_mask, found["values"] * UNEQUAL.action_mask, gradients


def plain(model: dict[str, Any]) -> Tensor:
    """Log-probs of each row, read alone and whole, from the model's logits."""
    engine = small_engine({}, model, value_head=True)

    def all_logprobs(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
        logits = model.logits(hidden[:, 0])[:, :VOCAB]
        return {"logprobs": logits.log_softmax(-1)}

    found = torch.zeros(UNEQUAL.tokens.shape)
    for row, length in enumerate(UNEQUAL.lengths.tolist()):
        batch = make_microbatches(UNEQUAL, torch.tensor([row]), engine, per_microbatch=1, share_bins=False)
        (table,) = engine.forward(batch, all_logprobs)
        after = UNEQUAL.tokens[row, 1:length]
        found[row, 1:length] = table["logprobs"][torch.arange(length - 1), after]
    engine.grid.close()
    return found * UNEQUAL.action_mask


@pytest.mark.parametrize("position", ["rope", "learned"])
def test_rows_that_share_bins_are_computed_and_trained_as_if_they_did_not(position: str, worlds: Worlds) -> None:
    model = {"position": position, "max_positions": 12}
    ((logprobs, values, gradients),) = worlds.run(1, computed, False, model)
    ((shared_logprobs, shared_values, shared_gradients),) = worlds.run(1, computed, True, model)
    assert logprobs.abs().sum() > 0
    torch.testing.assert_close(logprobs, worlds.run(1, plain, model)[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_logprobs, logprobs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shared_values, values, rtol=1e-5, atol=1e-5)
    assert gradients.keys() == shared_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            shared_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )
