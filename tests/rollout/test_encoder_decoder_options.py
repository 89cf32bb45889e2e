"""How a T5's tokens are chosen: transformers' penalty and filters, stop texts, ILQL's guidance and the mask of another
model, the same in one process and in others."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

from megarl.rollout.generator import Generator, Limits
from megarl.rollout.guided import guided
from megarl.rollout.lane import Masking
from megarl.rollout.requests import Request, Rollout, Sampling
from tests.gated import gated
from tests.models.adapters import adapted_engine, world_grid
from tests.models.exchange.t5 import EOS, START, VOCAB, make, pairs, save, their_logprobs
from tests.worlds import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
}
NEW = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T5 whose output layer is not the embedding, and beside it `other`, of somewhat different weights."""
    folder = tmp_path_factory.mktemp("t5") / "model"
    save("UL2", folder)
    other = make("UL2")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter += 0.3 * parameter.abs().mean() * torch.randn_like(parameter)
    other.save_pretrained(folder.parent / "other")
    return folder


def text_of(tokens: Sequence[int]) -> str:
    """A letter for each token."""
    return "".join(chr(ord("A") + token) for token in tokens)


def generated(folder: Path, layout: dict[str, Any], sampling: Sampling, kind: str = "plain") -> list[Rollout]:
    """Two responses to each prompt, of the policy alone, guided by its Q heads, or masked by another model."""
    grid = world_grid(**layout)
    heads = ("lm", "value", "q", "q") if kind == "guided" else ("lm",)
    engine = adapted_engine(grid, None, path=folder, heads=heads)
    more: dict[str, Any] = {"token_scorer": guided(2.0)} if kind == "guided" else {}
    if kind == "masked":
        other = adapted_engine(grid, None, path=folder.parent / "other", name="mask")
        more = {"masking": Masking(other, 0.5)}
    generator = Generator(engine, EOS, seed=5, limits=Limits(slots=3), decode=text_of, **more)
    requests = [
        Request(row, sample, tuple(prompt), sampling) for row, (prompt, _) in enumerate(pairs()) for sample in (0, 1)
    ]
    found = generator.generate(requests)
    generator.close()
    return found


def check_same(found: list[Rollout], wanted: list[Rollout]) -> None:
    for one, two in zip(found, wanted, strict=True):
        assert (one.response, one.finish_reason) == (two.response, two.finish_reason)
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-4)


@pytest.mark.parametrize("penalty", [1.3, 0.8])
def test_a_repetition_penalty_counts_what_the_decoder_read_as_in_transformers(
    penalty: float, folder: Path, worlds: Worlds
) -> None:
    """The start token and the response, and not the prompt."""
    sampling = Sampling(temperature=0.0, repetition_penalty=penalty, max_new_tokens=NEW)
    (found,) = worlds.run(1, generated, folder, {}, sampling)
    plain = worlds.run(1, generated, folder, {}, Sampling(temperature=0.0, max_new_tokens=NEW))[0]
    model = make("UL2")
    for row, (prompt, _) in enumerate(pairs()):
        settings = {"max_new_tokens": NEW, "do_sample": False, "repetition_penalty": penalty}
        theirs = model.generate(torch.tensor([prompt]), **settings)[0].tolist()
        assert found[2 * row].response == theirs[1:]
    assert [one.response for one in found] != [one.response for one in plain], "the penalty takes part"
    for name in LAYOUTS:
        size, layout = LAYOUTS[name]
        for rank in worlds.run(size, generated, folder, layout, sampling):
            check_same(rank, found)


def allowed_by_transformers(
    model: T5ForConditionalGeneration, prompt: list[int], response: list[int], **settings: Any
) -> list[bool]:
    """Whether each token of a response is among those that transformers' filters leave."""
    from transformers import LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    kinds = {"top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper, "min_p": MinPLogitsWarper}
    filters = LogitsProcessorList([kinds[name](value) for name, value in settings.items()])
    read = torch.tensor([[START, *response[:-1]]])
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[0]
    left = filters(read, logits)
    return [bool(torch.isfinite(left[place, token])) for place, token in enumerate(response)]


FILTERS = [{"top_p": 0.6}, {"top_k": 3}, {"min_p": 0.2}]


@pytest.mark.parametrize("settings", gated(FILTERS, FILTERS[1:]), ids=str)
def test_filters_leave_the_tokens_that_transformers_leaves(
    settings: dict[str, Any], folder: Path, worlds: Worlds
) -> None:
    (found,) = worlds.run(1, generated, folder, {}, Sampling(max_new_tokens=NEW, **settings))
    (free,) = worlds.run(1, generated, folder, {}, Sampling(max_new_tokens=NEW, temperature=3.0))
    model, kept, lost = make("UL2"), 0, 0
    for rollouts in (found, free):
        for one in rollouts:
            left = allowed_by_transformers(model, one.prompt, one.response, **settings)
            kept += sum(left) if rollouts is found else 0
            lost += left.count(False) if rollouts is free else 0
            assert rollouts is free or all(left)
    assert kept > 8 * 8
    assert lost > 8, "the filters take something away"
    for name in LAYOUTS:
        size, layout = LAYOUTS[name]
        for rank in worlds.run(size, generated, folder, layout, Sampling(max_new_tokens=NEW, **settings)):
            check_same(rank, found)


def test_a_text_ends_a_response_and_a_prompt_that_contains_it_does_not(folder: Path, worlds: Worlds) -> None:
    free = worlds.run(1, generated, folder, {}, Sampling(max_new_tokens=NEW, temperature=0.0))[0]
    stop = text_of(free[0].response[4:6])
    prompts = [text_of(prompt) for prompt, _ in pairs()]
    for texts in ((stop,), tuple(prompts)):
        sampling = Sampling(max_new_tokens=NEW, temperature=0.0, stop_text=texts)
        (found,) = worlds.run(1, generated, folder, {}, sampling)
        for one, before in zip(found, free, strict=True):
            whole = text_of(before.response)
            ends = [whole.find(text) + len(text) for text in texts if text in whole]
            assert text_of(one.response) == whole[: min(ends, default=len(whole))]
            assert one.finish_reason == ("stop" if ends else before.finish_reason)
        for rank in worlds.run(2, generated, folder, LAYOUTS["TP2+SP"][1], sampling):
            check_same(rank, found)
    assert stop in text_of(free[0].response)


@pytest.mark.parametrize("kind", ["guided", "masked"])
def test_tokens_are_guided_and_masked_alike_in_every_layout(kind: str, folder: Path, worlds: Worlds) -> None:
    sampling = Sampling(max_new_tokens=NEW)
    (found,) = worlds.run(1, generated, folder, {}, sampling, kind)
    (plain,) = worlds.run(1, generated, folder, {}, sampling)
    assert [one.response for one in found] != [one.response for one in plain]
    for name in LAYOUTS:
        size, layout = LAYOUTS[name]
        for rank in worlds.run(size, generated, folder, layout, sampling, kind):
            check_same(rank, found)


def test_masked_tokens_are_those_that_the_other_model_finds_likely(folder: Path, worlds: Worlds) -> None:
    """Log-probs are over these alone: the policy's, less that of the allowed tokens together."""
    other = T5ForConditionalGeneration.from_pretrained(folder.parent / "other").eval()
    (found,) = worlds.run(1, generated, folder, {}, Sampling(max_new_tokens=NEW), "masked")
    model, above = make("UL2"), 0
    for one in found:
        assert all(allowed_by_transformers(other, one.prompt, one.response, top_p=0.5))
        whole = their_logprobs(model, one.prompt, one.response)
        assert all(masked >= free - 1e-4 for masked, free in zip(one.logprobs, whole.tolist(), strict=True))
        above += sum(masked > free + 1e-2 for masked, free in zip(one.logprobs, whole.tolist(), strict=True))
    assert above > 8
    assert all(0 <= token < VOCAB for one in found for token in one.response)
