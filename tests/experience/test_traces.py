"""Which phases and responses are traced, and that every number stands at its token."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from megarl.data.prompts import Prompt
from megarl.experience.collection import Collected
from megarl.experience.rows import rollouts_to_rows
from megarl.experience.traces import Tracer, pieces, spread
from megarl.parallel.rows import Rows
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout
from megarl.tokenizers import ByteTokenizer

TOKENIZER = ByteTokenizer()
EOS = TOKENIZER.eos_id


def test_the_first_and_the_last_phase_are_traced_and_those_before_an_evaluation() -> None:
    assert [phase for phase in range(1, 11) if Tracer(2, 10, 4).due(phase)] == [1, 4, 8, 10]
    assert [phase for phase in range(1, 11) if Tracer(2, 10, None).due(phase)] == [1, 10]
    assert [phase for phase in range(1, 11) if Tracer(0, 10, 1).due(phase)] == []


@pytest.mark.parametrize(("count", "indices"), [(0, []), (1, [3]), (2, [3, 1]), (3, [3, 2, 1]), (9, [3, 0, 2, 4, 1])])
def test_the_best_and_the_worst_response_are_traced_and_others_between_them(count: int, indices: list[int]) -> None:
    assert spread([1.0, -2.0, [0.25, 0.25], 3.0, 0.0], count) == indices


def test_every_number_stands_at_its_token_and_the_log_probs_are_those_of_the_traced_rows() -> None:
    prompts = [Prompt("ab", (97, 98), {}, where="p.jsonl:1"), Prompt("c", (99,), {}, where="p.jsonl:2")]
    rollouts = [
        Rollout(0, 0, [97, 98], [104, 105, EOS], [-1.0, -2.0, -3.0], "eos"),
        Rollout(1, 0, [99], [106], [-4.0], "length"),
    ]
    scores: list[float | list[float]] = [0.5, 2.0]
    found = Collected(prompts, rollouts, scores, None, Scores([0.5, 2.0]), Scores([0.5, 2.0]), 0, 0)
    rows = rollouts_to_rows(rollouts)
    numbered = torch.arange(rows.tokens.numel(), dtype=torch.float32).view(rows.tokens.shape)
    rows = rows.with_columns(old_logprobs=numbered, advantages=numbered / 7)

    def logprobs(taken: Rows) -> Tensor:
        assert taken.tokens[0, 0] == 99  # the best first
        return -taken["old_logprobs"]

    best, other = Tracer(5, 1, None).records(rows, found, logprobs, TOKENIZER)
    assert (best["prompt"], best["where"], best["score"], best["finish_reason"]) == ("c", "p.jsonl:2", 2.0, "length")
    assert other["tokens"] == ["h", "i", "<|eos|>"]
    assert other["token_ids"] == [104, 105, EOS]
    assert other["rollout_logprobs"] == [-1.0, -2.0, -3.0]
    assert other["old_logprobs"] == [2.0, 3.0, 4.0]
    assert other["new_logprobs"] == [-2.0, -3.0, -4.0]
    assert other["advantages"] == [0.28571, 0.42857, 0.57143]
    assert best["old_logprobs"] == [6.0]
    assert "values" not in other
    json.dumps([best, other], allow_nan=False)


def test_a_long_response_is_traced_in_part_with_its_length() -> None:
    long = Rollout(0, 0, [97], [98] * 600, [-1.0] * 600, "length")
    found = Collected([Prompt("a", (97,), {})], [long], [1.0], None, Scores([1.0]), Scores([1.0]), 0, 0)
    rows = rollouts_to_rows([long])
    (trace,) = Tracer(1, 1, None).records(rows, found, lambda taken: taken["rollout_logprobs"], TOKENIZER)
    assert trace["length"] == 600
    assert len(trace["tokens"]) == len(trace["new_logprobs"]) == 512


def test_tokens_that_share_a_character_have_its_text_once() -> None:
    assert list(pieces(list("a中!".encode()), TOKENIZER.decode, {})) == ["a", "", "", "中", "!"]
    assert list(pieces(list("a中".encode())[:-1], TOKENIZER.decode, {})) == ["a", "", "\ufffd"]
    assert list(pieces([], TOKENIZER.decode, {})) == []
