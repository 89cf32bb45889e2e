"""Every family that can be exchanged: transformers' own greedy tokens, and log-probs of one pass over the sequence."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from megarl.config.sections.parallel import ParallelConfig
from megarl.models.build import build_engine
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.formats import open_source
from megarl.models.roles import Role
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Rollout, Sampling
from tests.models.exchange.published import PUBLISHED, VOCAB, fixed_tokens, save_published
from tests.worlds import Worlds

NEW = 12
PROMPTS = [tuple(row[:length].tolist()) for row, length in zip(fixed_tokens(), (3, 17, 8), strict=True)]
PENALTY = 9.0  # a tied embedding makes a model repeat itself, unless this is large


def requests() -> list[Request]:
    """Prompts of unequal length, the first also with a repetition penalty."""
    settings = Sampling(temperature=0.0, max_new_tokens=NEW)
    plain = [Request(number, 0, prompt, settings) for number, prompt in enumerate(PROMPTS)]
    return [plain[0], Request(0, 1, PROMPTS[0], replace(settings, repetition_penalty=PENALTY)), *plain[1:]]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("published")
    for name in PUBLISHED:
        save_published(name, root / name)
    return {name: root / name for name in PUBLISHED}


def theirs(folder: Path) -> list[tuple[list[int], list[float]]]:
    """transformers' greedy tokens of each request, one at a time, and their log-probs under its unpenalised logits."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config = transformers.GenerationConfig(do_sample=False)
    answers = []
    for request in requests():
        prompt = torch.tensor([request.prompt])
        tokens = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=NEW,
            eos_token_id=None,
            pad_token_id=0,
            repetition_penalty=request.sampling.repetition_penalty,
        )
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens, attention_mask=torch.ones_like(tokens)).logits.float(), -1)
        start = len(request.prompt)
        drawn = tokens[0, start:]
        answers.append((drawn.tolist(), logprobs[0, start - 1 : -1].gather(1, drawn[:, None])[:, 0].tolist()))
    return answers


def ours(folders: dict[str, Path]) -> dict[str, list[Rollout]]:
    """In three slots: the last request takes over a slot, while others are under way."""
    device = start_world()
    answers = {}
    for name, folder in folders.items():
        grid = Grid(Layout(), device)
        source = open_source(folder)
        role = Role("policy", source.model, VOCAB, source=source)
        engine = build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1)
        generator = Generator(engine, -1, seed=1, limits=Limits(slots=3))
        answers[name] = generator.generate(requests())
        grid.close()
    return answers


def test_every_family_is_among_the_models() -> None:
    decoders = [family for family in FAMILIES if family not in ("t5", "mt5")]  # those: tests/models/exchange/test_t5.py
    assert all(any(name.startswith(family) for name in PUBLISHED) for family in decoders)


def test_greedy_tokens_and_their_log_probs_are_those_of_transformers(
    worlds: Worlds, published: dict[str, Path]
) -> None:
    (found,) = worlds.run(1, ours, published)
    for name, folder in published.items():
        wanted = theirs(folder)
        assert wanted[0][0] != wanted[1][0], f"the penalty changes nothing in {name}"
        assert [rollout.response for rollout in found[name]] == [tokens for tokens, _ in wanted], name
        for rollout, (_, logprobs) in zip(found[name], wanted, strict=True):
            assert rollout.logprobs == pytest.approx(logprobs, abs=1e-4), name
