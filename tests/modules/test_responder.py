"""From prompts to requests: settings, numbers, and prompts that are too long."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.rl import RolloutConfig
from megarl.data.prompts import Prompt
from megarl.errors import ConfigError, DataError
from megarl.models.gpt import GPT
from megarl.modules import responder as responding
from megarl.modules.responder import Responder
from megarl.parallel.layout import Layout
from megarl.rollout.requests import Request
from megarl.tokenizers import CharacterTokenizer

PROMPTS = [Prompt("", (1, 2, 3), {}), Prompt("", (1, 2, 3, 0, 1), {})]
CONTEXT = 8


class Remembers:
    """Stands for the generator."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options, self.scorer = options, None
        self.requests: list[Request] = []
        self.has_cache = False

    def generate(self, requests: list[Request], **which: Any) -> list[Any]:
        self.requests, self.which, self.has_cache = requests, which, True
        return []

    def close(self) -> None:
        self.has_cache = False


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responding, "Generator", Remembers)


def respond(n: int = 1, prompts: list[Prompt] = PROMPTS, changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    engine: Any = SimpleNamespace(config=SimpleNamespace(max_positions=CONTEXT), grid=SimpleNamespace(layout=Layout()))
    responder = Responder(engine, CharacterTokenizer("abcd"), RolloutConfig(**settings), seed=3)
    responder.respond(prompts, n, stream=1, phase=4, **(changes or {}))
    return responder.generator


def test_each_prompt_is_asked_n_times_and_numbered_by_its_place(generator: None) -> None:
    asked = respond(n=2, max_new_tokens=3, temperature=0.5, stop=["x"])
    assert [(r.prompt_id, r.sample_id, r.prompt) for r in asked.requests] == [
        (0, 0, (1, 2, 3)),
        (0, 1, (1, 2, 3)),
        (1, 0, (1, 2, 3, 0, 1)),
        (1, 1, (1, 2, 3, 0, 1)),
    ]
    assert {(r.sampling.temperature, r.sampling.max_new_tokens, r.sampling.stop_text) for r in asked.requests} == {
        (0.5, 3, ("x",))
    }
    assert asked.which == {"stream": 1, "phase": 4, "weights_version": 4}
    assert asked.options["seed"] == 3
    assert asked.scorer is GPT.logits


@pytest.mark.parametrize("graphs", [False, True])
def test_the_cache_is_kept_for_graphs_alone(generator: None, graphs: bool) -> None:
    assert respond(max_new_tokens=3, cuda_graphs=graphs).has_cache == graphs


def test_a_setting_may_differ_from_the_runs(generator: None) -> None:
    asked = respond(max_new_tokens=3, temperature=0.5, changes={"temperature": 0.0})
    assert {(r.sampling.temperature, r.sampling.max_new_tokens) for r in asked.requests} == {(0.0, 3)}


def test_a_prompt_that_leaves_no_room_is_an_error_unless_told_otherwise(generator: None) -> None:
    with pytest.raises(ConfigError, match=r"prompt 1 has 5 tokens .* set rollout.too_long=truncate or drop"):
        respond(max_new_tokens=4)


def test_a_prompt_that_is_cut_loses_its_beginning(generator: None, caplog: pytest.LogCaptureFixture) -> None:
    asked = respond(max_new_tokens=4, too_long="truncate")
    assert [r.prompt for r in asked.requests] == [(1, 2, 3), (2, 3, 0, 1)]
    assert caplog.messages == ["1 of 2 prompts were too long and cut on the left"]


def test_a_prompt_that_is_left_out_leaves_the_others_their_numbers(
    generator: None, caplog: pytest.LogCaptureFixture
) -> None:
    asked = respond(n=2, prompts=PROMPTS[::-1], max_new_tokens=4, too_long="drop")
    assert [(r.prompt_id, r.sample_id) for r in asked.requests] == [(1, 0), (1, 1)]
    assert caplog.messages == ["2 of 4 prompts were too long and left out"]


def test_a_phase_without_any_prompt_is_refused(generator: None) -> None:
    with pytest.raises(DataError, match=r"no prompt leaves room for rollout.max_new_tokens=6 in a context of 8"):
        respond(max_new_tokens=6, too_long="drop")
