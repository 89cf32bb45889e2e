"""From prompts to requests: settings, numbers, and what is refused before any phase."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from megarl.config.sections.model import ExpertsConfig, ModelConfig
from megarl.config.sections.rollout import RolloutConfig, RolloutEngineConfig
from megarl.data.prompts import Prompt
from megarl.errors import ConfigError, DataError
from megarl.experience import sources
from megarl.experience.sources import GeneratedRollouts, ReplayedRollouts
from megarl.models.gpt import GPT
from megarl.parallel.layout import Layout
from megarl.rollout.noise import EVALUATION, GREEDY, TRAINING
from megarl.rollout.requests import Request, Rollout
from megarl.rollout.stored import dump, phase_file
from megarl.tokenizers import CharacterTokenizer
from tests.parallel.engines import small_engine
from tests.refusals import refused
from tests.worlds import Worlds

PROMPTS = [Prompt("", (1, 2, 3), {}), Prompt("", (1, 2, 3, 0, 1), {})]


class Remembers:
    """Stands for the generator."""

    def __init__(self, *_: Any, **options: Any) -> None:
        self.options, self.token_scorer = options, None
        self.requests: list[Request] = []
        self.has_cache = False

    def generate(self, requests: list[Request], **which: Any) -> list[Any]:
        self.requests, self.which, self.has_cache = requests, which, True
        return []

    def close(self) -> None:
        self.has_cache = False


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "Generator", Remembers)


def source(unit: str = "phase", **settings: Any) -> GeneratedRollouts:
    engine: Any = SimpleNamespace(grid=SimpleNamespace(layout=Layout()))
    return GeneratedRollouts(engine, CharacterTokenizer("abcd"), RolloutConfig(**settings), seed=3, unit=unit)


def collected(n: int = 1, changes: dict[str, Any] | None = None, **settings: Any) -> Any:
    made = source(**settings)
    made.publish(9)
    made.collect(PROMPTS, n, stream=1, phase=4, **(changes or {}))
    return made.generator


def test_each_prompt_is_asked_n_times_and_numbered_by_its_place(generator: None) -> None:
    asked = collected(n=2, max_new_tokens=3, temperature=0.5, stop=["x"])
    assert [(r.prompt_id, r.sample_id, r.prompt) for r in asked.requests] == [
        (0, 0, (1, 2, 3)),
        (0, 1, (1, 2, 3)),
        (1, 0, (1, 2, 3, 0, 1)),
        (1, 1, (1, 2, 3, 0, 1)),
    ]
    assert {(r.sampling.temperature, r.sampling.max_new_tokens, r.sampling.stop_text) for r in asked.requests} == {
        (0.5, 3, ("x",))
    }
    del asked.which["place"]
    assert asked.which == {"stream": 1, "phase": 4, "weights_version": 9}
    assert asked.options["seed"] == 3
    assert asked.token_scorer is GPT.logits


@pytest.mark.parametrize(
    ("stream", "unit", "when"),
    [
        (TRAINING, "phase", "in phase 5"),
        (GREEDY, "phase", "in phase 5"),
        (EVALUATION, "phase", "in the evaluation after phase 4"),
        (EVALUATION + 1, "step", "in the evaluation after step 4"),
    ],
)
def test_messages_say_in_what_part_of_a_run_a_response_was_drawn(
    generator: None, stream: int, unit: str, when: str
) -> None:
    made = source(unit=unit)
    made.collect(PROMPTS, 1, stream=stream, phase=4)
    assert made.generator.which["place"](1) == f"prompt 1 {when}"  # type: ignore[attr-defined]


@pytest.mark.parametrize("graphs", [False, True])
def test_the_cache_is_kept_for_graphs_alone(generator: None, graphs: bool) -> None:
    assert collected(max_new_tokens=3, engine=RolloutEngineConfig(cuda_graphs=graphs)).has_cache == graphs


def test_a_setting_may_differ_from_the_runs(generator: None) -> None:
    asked = collected(max_new_tokens=3, temperature=0.5, changes={"temperature": 0.0})
    assert {(r.sampling.temperature, r.sampling.max_new_tokens) for r in asked.requests} == {(0.0, 3)}


def test_a_cache_that_is_too_small_for_the_longest_prompt_is_refused_before_any_phase(
    generator: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr(Remembers, "check_length", lambda self, length: checked.append(length), raising=False)
    source(max_new_tokens=3).check_prompts(PROMPTS)
    ReplayedRollouts("folder", RolloutConfig(max_new_tokens=3), MIXTURE).check_prompts(PROMPTS)  # makes no cache
    source(max_new_tokens=3).check_prompts([])  # never generates
    assert checked == [8]


def test_stop_texts_that_cannot_be_sampled_with_are_refused_before_any_phase(generator: None) -> None:
    with refused(ConfigError, names=("rollout.stop",)):
        source(stop=[""])
    with refused(ConfigError, names=("rollout.stop",)):
        ReplayedRollouts("folder", RolloutConfig(stop=[""]), MIXTURE)


MIXTURE = ModelConfig(num_layers=2, experts=ExpertsConfig(count=99, chosen=2))
WORDLESS: Any = SimpleNamespace(eos_id=3, stop_ids=lambda template: [3], decode=str)
ASKED = [Prompt("", (number, 1), {}) for number in range(4)]


def dumped_and_replayed(folder: str) -> tuple[list[Rollout], list[Rollout]]:
    """Responses of a model, and what a replay in the same world gives; the model is not asked."""
    settings = RolloutConfig(max_new_tokens=5)
    model = GeneratedRollouts(small_engine({}, seed=1, train=False), WORDLESS, settings, seed=1, dump=folder)
    model.publish(7)
    drawn = model.collect(ASKED, 1, stream=TRAINING, phase=2)
    replayed = ReplayedRollouts(folder, settings, MIXTURE)
    replayed.publish(8)
    return drawn, replayed.collect(ASKED, 1, stream=TRAINING, phase=2, temperature=0.5)


def test_what_one_source_dumps_another_replays_with_its_version(worlds: Worlds, tmp_path: Path) -> None:
    for drawn, replayed in worlds.run(2, dumped_and_replayed, str(tmp_path)):
        assert replayed == drawn
        assert [(rollout.prompt, rollout.weights_version) for rollout in drawn] == [([n, 1], 7) for n in range(4)]
    assert [path.name for path in tmp_path.iterdir()] == ["train-000002.jsonl"]


def dumped_where_nothing_can_be(folder: str) -> None:
    settings = RolloutConfig(max_new_tokens=2)
    model = GeneratedRollouts(small_engine({}, seed=1, train=False), WORDLESS, settings, seed=1, dump=folder)
    with refused(DataError, key="rollout.dump", where="train-000000.jsonl", offers={"rollout.dump": [None]}):
        model.collect([Prompt("", (1,), {})], 1, stream=TRAINING, phase=0)


def test_a_dump_that_cannot_be_written_ends_every_rank(worlds: Worlds, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    worlds.run(2, dumped_where_nothing_can_be, str(tmp_path / "file"))


def test_a_replayed_response_has_the_experts_that_computed_it_if_the_run_follows_them(tmp_path: Path) -> None:
    routes = [np.arange(len(prompt.tokens) * 4, dtype=np.int16).reshape(-1, 2, 2) for prompt in PROMPTS]
    made = [
        Rollout(number, 0, list(prompt.tokens), [1], [-1.0], "length", routes=routes[number])
        for number, prompt in enumerate(PROMPTS)
    ]
    dump(phase_file(tmp_path, TRAINING, 4), made)
    for follows in (True, False):
        settings = RolloutConfig(engine=RolloutEngineConfig(router_replay=follows))
        found = ReplayedRollouts(str(tmp_path), settings, MIXTURE).collect(PROMPTS, 1, stream=TRAINING, phase=4)
        assert found == made
        for one, wanted in zip(found, routes, strict=True):
            assert (one.routes is None) if not follows else np.array_equal(one.routes, wanted)


@pytest.mark.parametrize(
    "routes",
    [None, np.zeros((3, 2, 1), np.int16), np.zeros((3, 1, 2), np.int16), np.full((3, 2, 2), 99, np.int16)],
    ids=["none", "fewer a token", "fewer layers", "more experts"],
)
def test_a_dump_without_the_experts_that_a_run_follows_is_refused(routes: np.ndarray | None, tmp_path: Path) -> None:
    dump(phase_file(tmp_path, TRAINING, 4), [Rollout(0, 0, [1, 2, 3], [1], [-1.0], "length", routes=routes)])
    settings = RolloutConfig(engine=RolloutEngineConfig(router_replay=True))
    key = "rollout.engine.router_replay"
    with refused(ConfigError, key=key, value=True, where=str(tmp_path), offers={key: [False]}):
        ReplayedRollouts(str(tmp_path), settings, MIXTURE).collect(PROMPTS[:1], 1, stream=TRAINING, phase=4)
