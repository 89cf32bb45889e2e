"""The same responses in every layout, slot count and order; log-probs that a full forward pass confirms; nothing left
behind in the engine."""

import gc
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from megarl.errors import ConfigError, NumericsError
from megarl.experience.rows import forward_rows
from megarl.models.cache import KVCache
from megarl.models.gpt import GPT
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.rows import Microbatch, Rows
from megarl.rollout.generator import Generator, Limits, Stats
from megarl.rollout.noise import EVALUATION, TRAINING
from megarl.rollout.requests import Request, Rollout, Sampling
from tests.gated import gated
from tests.parallel.engines import VOCAB, batches, small_engine
from tests.refusals import refused
from tests.worlds import Worlds

EOS = 3
MODERATE = {"init_std": 0.12}  # peaked enough for filters to bite, far enough from ties
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "DP2": (2, {}),
    "TP2 with sequence parallelism": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2 with virtual stages": (2, {"pp": 2, "vpp": 2}),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}),
    "PP2xDP2": (4, {"pp": 2}),
    "PP4": (4, {"pp": 4}),
}
SETTINGS = [
    Sampling(),
    Sampling(temperature=0.7, top_k=20),
    Sampling(temperature=0.0),
    Sampling(top_p=0.8, repetition_penalty=1.2),
    Sampling(temperature=1.3, min_p=0.05, forbidden=(7, 8), stop=((11,), (60, 61))),
]


def some_requests(count: int = 20) -> list[Request]:
    """Prompts of 1 to 23 tokens, 5 to 24 new ones, every kind of setting; two samples of each prompt."""
    dice = random.Random(0)
    requests = []
    for number in range(count // 2):
        prompt = tuple(dice.randrange(VOCAB) for _ in range(1 + number * 11 % 23))
        settings = replace(SETTINGS[number % len(SETTINGS)], max_new_tokens=5 + number * 7 % 20)
        requests += [Request(number, sample, prompt, settings) for sample in (0, 1)]
    return requests


def generator_of(engine: Engine, **options: Any) -> Generator:
    return Generator(engine, EOS, seed=5, limits=Limits(**options))


def generated(
    layout: dict[str, Any], model: dict[str, Any] | None = None, order: int | None = None, **limits: Any
) -> tuple[list[Rollout], Stats]:
    engine = small_engine(layout, {**MODERATE, **(model or {})}, train=False)
    requests = some_requests()
    if order is not None:
        random.Random(order).shuffle(requests)
    generator = generator_of(engine, **limits)
    return generator.generate(requests), generator.stats


def check_same(found: list[Rollout], wanted: list[Rollout], case: object) -> None:
    """Token for token. Candidates within 1e-5 of each other could excuse a difference; there are none here."""
    differing = [
        (one.prompt_id, one.sample_id) for one, two in zip(found, wanted, strict=True) if one.response != two.response
    ]
    assert differing == [], f"{case}: responses differ"
    for one, two in zip(found, wanted, strict=True):
        assert (one.prompt_id, one.sample_id, one.finish_reason) == (two.prompt_id, two.sample_id, two.finish_reason)
        assert one.logprobs == pytest.approx(two.logprobs, abs=1e-5)


@pytest.fixture(scope="module")
def alone(worlds: Worlds) -> list[Rollout]:
    """One process, everything in flight at once."""
    ((rollouts, _),) = worlds.run(1, generated, {})
    return rollouts  # type: ignore[no-any-return]


def with_few_and_many_slots(layout: dict[str, Any]) -> list[list[Rollout]]:
    engine = small_engine(layout, MODERATE, train=False)
    found = []
    for slots in (7, 128):
        requests = some_requests()
        random.Random(slots).shuffle(requests)
        found.append(generator_of(engine, slots=slots).generate(requests))
    return found


@pytest.mark.parametrize("name", gated(LAYOUTS, ["PP4", "TP2"]))
def test_a_layout_draws_the_same_tokens(name: str, worlds: Worlds, alone: list[Rollout]) -> None:
    size, layout = LAYOUTS[name]
    for few, many in worlds.run(size, with_few_and_many_slots, layout):
        check_same(few, alone, (name, 7))
        check_same(many, alone, (name, 128))


@pytest.mark.parametrize(("size", "layout", "slots"), [(1, {}, 7), (1, {}, 128), (2, {"tp": 2}, 5)])
def test_passes_of_fixed_shapes_draw_the_same_tokens(
    size: int, layout: dict[str, Any], slots: int, worlds: Worlds, alone: list[Rollout]
) -> None:
    """What a GPU records as graphs, without the recording."""
    for rollouts, _ in worlds.run(size, generated, layout, order=slots, slots=slots, graphs=True):
        check_same(rollouts, alone, (layout, slots))


def graphs_in_a_pipeline() -> None:
    engine, key = small_engine({"pp": 2}, train=False), "rollout.engine.cuda_graphs"
    with refused(
        ConfigError, key=key, value=True, offers={key: [False]}, names=("rollout.engine.cuda_graphs=true", "PP2")
    ):
        generator_of(engine, graphs=True)


def test_a_pipeline_has_no_passes_of_fixed_shapes(worlds: Worlds) -> None:
    worlds.run(2, graphs_in_a_pipeline)


def static_shapes() -> list[set[tuple[int, int, int]]]:
    """(rows, length, tokens of an encoder) of the passes that there are after each call."""
    generator = generator_of(small_engine({}, MODERATE, train=False), slots=6, graphs=True)
    shapes = []
    for call in range(3):
        generator.token_scorer = GPT.logits if call < 2 else lambda model, states: model.logits(states) / 2
        generator.generate([Request(n, 0, (n,) * 50, Sampling(max_new_tokens=1 + 3 * n)) for n in range(5)], phase=call)
        assert generator.static is not None
        assert generator.static.token_scorer is generator.token_scorer
        shapes.append(set(generator.static.passes))
    generator.close()
    assert generator.static is None
    return shapes


def test_fixed_shapes_are_few_and_kept(worlds: Worlds) -> None:
    (shapes,) = worlds.run(1, static_shapes)
    assert len({tuple(sorted(found)) for found in shapes}) == 1
    assert shapes[0] <= {(rows, 63, 0) for rows in (1, 2, 4, 5)}  # a slot's length is 50 + 13


@pytest.mark.parametrize("slots", [1, 7, 32])
def test_slots_and_order_change_nothing(slots: int, worlds: Worlds, alone: list[Rollout]) -> None:
    ((rollouts, stats),) = worlds.run(1, generated, {}, order=slots, slots=slots)
    check_same(rollouts, alone, slots)
    tokens = sum(len(rollout.response) for rollout in rollouts)
    assert stats.response_tokens == stats.decoded_rows == tokens
    assert stats.prefilled_tokens == sum(len(rollout.prompt) - 1 for rollout in rollouts)
    assert -(-tokens // slots) <= stats.decode_passes <= -(-tokens // slots) + 24


def test_the_cases_are_not_all_alike(alone: list[Rollout]) -> None:
    """What the comparisons above are worth: all reasons to end, and samples of a prompt that differ."""
    assert {rollout.finish_reason for rollout in alone} == {"eos", "stop", "length"}
    assert all(rollout.response[-1] == EOS for rollout in alone if rollout.finish_reason == "eos")
    by_name = {(rollout.prompt_id, rollout.sample_id): rollout.response for rollout in alone}
    for number in range(10):
        greedy = number % len(SETTINGS) == 2
        assert (by_name[number, 0] == by_name[number, 1]) == greedy
    assert all(not {7, 8} & set(by_name[number, sample]) for number in (4, 9) for sample in (0, 1))


VARIANTS: dict[str, dict[str, Any]] = {
    "grouped heads": {"num_kv_heads": 2},
    "one key-value head": {"num_kv_heads": 1, "qk_norm": True},
    "learned positions with an offset": {"position": "learned", "position_offset": 2, "norm": "layernorm"},
    "no positions": {"position": "none", "tie_embeddings": True},
    "sliding window": {"sliding_window": 5},
    "parallel residual, biases": {
        "parallel_residual": "two_norms",
        "qkv_bias": True,
        "lm_head_bias": True,
        "rope_percent": 0.5,
    },
}


def rescored(layout: dict[str, Any], model: dict[str, Any], **limits: Any) -> tuple[list[Rollout], float]:
    """Rollouts, and the largest difference of their log-probs from those of one pass over the whole sequence."""
    engine = small_engine(layout, {**MODERATE, **model}, train=False)
    requests = some_requests()
    rollouts = generator_of(engine, **limits).generate(requests)
    time = max(len(rollout.tokens) for rollout in rollouts)
    tokens, mask = torch.zeros(len(rollouts), time, dtype=torch.int64), torch.zeros(len(rollouts), time)
    drawn = torch.zeros(len(rollouts), time)
    for row, rollout in enumerate(rollouts):
        response = slice(len(rollout.prompt), len(rollout.tokens))
        tokens[row, : response.stop] = torch.tensor(rollout.tokens)
        mask[row, response] = 1.0
        drawn[row, response] = torch.tensor(rollout.logprobs)
    settings = {(request.prompt_id, request.sample_id): request.sampling for request in requests}
    heats = [settings[rollout.prompt_id, rollout.sample_id].temperature or 1.0 for rollout in rollouts]

    def score(model: GPT, hidden: torch.Tensor, batch: Microbatch) -> dict[str, torch.Tensor]:
        return {
            str(heat): model.logprobs(hidden, batch.targets, batch.target_mask, heat).logprobs for heat in set(heats)
        }

    rows = Rows(tokens, torch.tensor([len(rollout.tokens) for rollout in rollouts]), mask)
    whole = forward_rows(engine, rows, score, per_microbatch=len(rows), share_bins=False)
    worst = max(float((whole[str(heat)][row] - drawn[row]).abs().max()) for row, heat in enumerate(heats))
    return rollouts, worst


# Heads are cut by TP; positions and an embedding of two stages concern PP.
OF_TWO = {"grouped heads": "TP2", "one key-value head": "TP2", "parallel residual, biases": "TP2"}
CASES = [(variant, OF_TWO.get(variant, "PP2")) for variant in VARIANTS]
OF_FOUR = [(variant, "TP2xPP2") for variant in VARIANTS]


@pytest.mark.parametrize(("variant", "layout"), gated([*CASES, *OF_FOUR], OF_FOUR))
def test_log_probs_are_those_of_a_pass_over_the_whole_sequence(variant: str, layout: str, worlds: Worlds) -> None:
    ((alone, worst),) = worlds.run(1, rescored, {}, VARIANTS[variant], slots=5)
    assert worst < 1e-5
    assert max(abs(value) for rollout in alone for value in rollout.logprobs) > 1.0
    size, grid = LAYOUTS[layout]
    for rollouts, worst in worlds.run(size, rescored, grid, VARIANTS[variant], slots=9):
        check_same(rollouts, alone, variant)
        assert worst < 1e-5


@pytest.mark.parametrize("variant", gated(["grouped heads", "sliding window"], ["grouped heads"]))
def test_prompts_read_piece_by_piece_give_the_same(variant: str, worlds: Worlds) -> None:
    ((whole, _),) = worlds.run(1, rescored, {}, VARIANTS[variant])
    for budget in (4, 30):
        ((pieces, worst),) = worlds.run(1, rescored, {}, VARIANTS[variant], prefill_tokens=budget)
        check_same(pieces, whole, budget)
        assert worst < 1e-5
    ((pieces, worst), _) = worlds.run(2, rescored, {"pp": 2}, VARIANTS[variant], prefill_tokens=4)
    check_same(pieces, whole, "PP2")


def streams() -> dict[str, list[list[int]]]:
    engine = small_engine({}, MODERATE, train=False)
    generator = generator_of(engine)
    request = [Request(0, sample, (1, 2, 3), Sampling(max_new_tokens=12)) for sample in range(3)]

    def draw(**name: Any) -> list[list[int]]:
        return [rollout.response for rollout in generator.generate(request, **name)]

    drawn = {
        "first": draw(),
        "again": draw(stream=TRAINING, phase=0),
        "phase": draw(phase=1),
        "evaluation": draw(stream=EVALUATION),
    }
    generator.close()
    drawn["after close"] = draw()
    return drawn


def test_phases_and_streams_draw_anew_and_a_repetition_does_not(worlds: Worlds) -> None:
    (drawn,) = worlds.run(1, streams)
    assert drawn["again"] == drawn["first"] == drawn["after close"]
    distinct = [drawn["first"], drawn["phase"], drawn["evaluation"]]
    assert all(one != two for i, one in enumerate(distinct) for two in distinct[:i])


def trained(layout: dict[str, Any], generating: bool, **options: Any) -> list[float]:
    """Losses and gradient norms of three steps, with a generation before each or without."""
    engine = small_engine(layout, {"dropout": 0.2, "init_std": 0.1}, **options)
    generator = generator_of(engine, slots=4)
    numbers = []
    for step in range(3):
        engine.train()
        if generating:
            generator.generate([Request(n, 0, (1, 2, n), Sampling(max_new_tokens=4 + n)) for n in range(6)], phase=step)
            assert all(module.training for chunk in engine.chunks for module in chunk.modules())
        metrics = engine.train_step(batches(engine, step), cross_entropy, count_targets)
        numbers += [metrics["loss"], engine.apply_gradients()]
    return numbers


@pytest.mark.parametrize(
    ("size", "layout", "options"),
    [
        (1, {}, {"recompute": "full"}),
        pytest.param(2, {"tp": 2, "sequence_parallel": True}, {}, marks=pytest.mark.gate),
        (2, {"tp": 2, "sequence_parallel": True}, {"recompute": "selective"}),
        (2, {"pp": 2, "vpp": 2}, {}),
    ],
)
def test_training_goes_on_as_if_nothing_had_been_generated(
    size: int, layout: dict[str, Any], options: dict[str, Any], worlds: Worlds
) -> None:
    """Bit for bit: dropout's generators, sequence parallelism, recomputation and training mode are as they were."""
    without = worlds.run(size, trained, layout, False, **options)
    assert worlds.run(size, trained, layout, True, **options) == without


def one_long_and_many_short(layout: dict[str, Any]) -> Stats:
    generator = generator_of(small_engine(layout, train=False), slots=4)
    lengths = [48, *[4] * 33]
    never = {"forbidden": (EOS,)}
    generator.generate(
        [Request(n, 0, (1 + n,), Sampling(max_new_tokens=length, **never)) for n, length in enumerate(lengths)]
    )
    return generator.stats


def test_short_responses_fill_the_slots_beside_a_long_one(worlds: Worlds) -> None:
    (stats,) = worlds.run(1, one_long_and_many_short, {})
    assert stats == Stats(34, 48 + 33 * 4, 0, 48, 48 + 33 * 4)  # a static batch would take 48 + 8 * 4 passes
    stats, _ = worlds.run(2, one_long_and_many_short, {"pp": 2})
    assert stats.decoded_rows == 180
    assert 90 <= stats.decode_passes <= 92  # two rows in a pass


def cache_use(budget_in_slots: float) -> tuple[int, int, int, bool]:
    """The budget, the cache's bytes and slots, and whether its memory is gone after `close`."""
    engine = small_engine({}, train=False)
    requests = some_requests()
    length = max(len(request.prompt) + request.sampling.max_new_tokens for request in requests)
    budget = int(budget_in_slots * KVCache.slot_bytes(engine.config, 4, 1, length))
    generator = generator_of(engine, slots=20, cache_bytes=budget)
    generator.generate(requests)
    assert generator.cache is not None
    held = weakref.ref(generator.cache.store.untyped_storage())
    taken, slots = generator.cache.nbytes, generator.cache.slots
    generator.close()
    gc.collect()
    return budget, taken, slots, generator.cache is None and held() is None


@pytest.mark.parametrize(("slots", "held"), [(3.9, 3), (20.0, 20), (400.0, 20)])
def test_the_cache_keeps_to_its_budget_and_close_frees_it(slots: float, held: int, worlds: Worlds) -> None:
    ((budget, taken, found, freed),) = worlds.run(1, cache_use, slots)
    assert taken <= budget
    assert found == held
    assert freed


def refused_and_gone_on(
    layout: dict[str, Any], requests: list[Request], expected: dict[str, Any], **limits: Any
) -> None:
    generator = generator_of(small_engine(layout, train=False), **limits)
    with refused(ConfigError, **expected):
        generator.generate(requests)
    generator.limits = Limits()
    assert len(generator.generate([Request(0, 0, (1,), Sampling(max_new_tokens=2))])) == 1


def test_every_rank_refuses_what_one_cannot_do(worlds: Worlds) -> None:
    """Also a rank whose own share would be fine: it would wait for the others for ever."""
    fine = [Request(n, 0, (1, 2), Sampling(max_new_tokens=4)) for n in range(5)]
    long = Request(9, 0, (1,) * 60, Sampling(max_new_tokens=5))
    expected = {"key": "rollout.max_new_tokens", "value": 5, "where": "prompt 9", "names": ("60", "64")}
    worlds.run(2, refused_and_gone_on, {}, [*fine, long], expected)
    # 2 layers x keys and values x 4 heads x 16 x float32 x 6 tokens = 6144, twice
    key = "rollout.engine.cache_bytes"
    expected = {"key": key, "value": 1000, "offers": {key: [12288]}, "names": ("6 tokens", "6144")}
    worlds.run(2, refused_and_gone_on, {"pp": 2}, fine, expected, cache_bytes=1000)


def few(layout: dict[str, Any], counts: Sequence[int]) -> list[tuple[list[list[int]], list[int]]]:
    """Responses, and the prompt ids this replica reported as they were done, for each number of requests."""
    engine, found = small_engine(layout, MODERATE, train=False), []
    for count in counts:
        reported: list[int] = []
        rollouts = generator_of(engine).generate(
            [Request(n, 0, (5, n), Sampling(max_new_tokens=6)) for n in range(count)],
            on_finished=lambda done, all_done=reported: all_done.extend(rollout.prompt_id for rollout in done),
        )
        found.append(([rollout.response for rollout in rollouts], reported))
    return found


@pytest.mark.parametrize("layout", [{}, {"pp": 2}, {"tp": 2}])
def test_fewer_requests_than_ranks_or_stages(layout: dict[str, Any], worlds: Worlds) -> None:
    counts = (0, 1, 3)
    (wanted,) = worlds.run(1, few, {}, counts)
    ranks = worlds.run(2, few, layout, counts)
    replicas = ranks if not layout else ranks[:1]
    for case, count in enumerate(counts):
        assert all(rank[case][0] == wanted[case][0] for rank in ranks)
        assert sorted(prompt for rank in replicas for prompt in rank[case][1]) == list(range(count))


def text_stops() -> list[tuple[str, str]]:
    """Text and reason of responses that a stop text may end; every token is two letters."""

    def decode(tokens: Any) -> str:
        return "".join(chr(97 + token % 13) + chr(97 + token % 7) for token in tokens)

    engine = small_engine({}, MODERATE, train=False)
    generator = Generator(engine, EOS, seed=1, decode=decode)
    sampling = Sampling(max_new_tokens=30, stop_text=("ab", "cd", "ef"), forbidden=(EOS,))
    rollouts = generator.generate([Request(n, 0, (n,), sampling) for n in range(40)])
    return [(decode(rollout.response), rollout.finish_reason) for rollout in rollouts]


def test_stop_texts_are_found_across_the_borders_of_tokens(worlds: Worlds) -> None:
    (answers,) = worlds.run(1, text_stops)

    def first_stop(text: str) -> int:
        return min((text.find(stop) for stop in ("ab", "cd", "ef") if stop in text), default=-1)

    across = 0
    for text, reason in answers:
        at = first_stop(text)
        assert (reason == "stop") == (at >= 0)
        if at >= 0:
            assert len(text) - 2 <= at + 1 < len(text)  # it ends in the last token
            across += at % 2
    assert across > 3


def scored(token_scorer: Callable[[GPT, torch.Tensor], torch.Tensor]) -> list[list[int]]:
    generator = Generator(small_engine({}, train=False), EOS, seed=1, token_scorer=token_scorer)
    return [r.response for r in generator.generate([Request(0, 0, (1,), Sampling(max_new_tokens=3))])]


def test_a_scorer_replaces_the_model_s_own_logits(worlds: Worlds) -> None:
    def only_42(model: GPT, states: torch.Tensor) -> torch.Tensor:
        scores = torch.full_like(model.logits(states), -1e9)
        scores[:, 42] = 0.0
        return scores

    assert worlds.run(1, scored, only_42) == [[[42, 42, 42]]]


# --- scores that are no numbers ---------------------------------------------------------------------------------------


def drawn_by_bad_scores(layout: dict[str, Any], bad: float) -> set[int]:
    """Of five prompts, the first token of the third has a bad score on one shard: who was reported."""

    def token_scorer(model: GPT, states: torch.Tensor) -> torch.Tensor:
        scores = model.logits(states)
        if model.shard.start == 0:
            scores[marked(states), 5] = bad
        return scores

    def marked(states: torch.Tensor) -> torch.Tensor:
        return torch.isclose(states[:, 0], states.new_tensor(mark[0]), atol=1e-4) if mark else states[:, 0] > torch.inf

    mark: list[float] = []
    engine = small_engine(layout, MODERATE, train=False)
    generator = Generator(engine, EOS, seed=5, limits=Limits(slots=2), token_scorer=token_scorer)
    requests = [Request(number, 0, (number + 1,), Sampling(max_new_tokens=2)) for number in range(5)]
    rows = Rows(torch.tensor([[3]]), torch.tensor([1]), torch.zeros(1, 1))
    (one_token,) = make_microbatches(rows, torch.arange(1), engine, per_microbatch=1, share_bins=False)
    states = engine.forward([one_token], lambda model, hidden, batch: {"state": model.whole_sequence(hidden)[0]})
    mark.append(float(states[0]["state"][0, 0]))
    reported: set[int] = set()
    with refused(NumericsError, where="file:3", names=("token 1", "response 0")):
        generator.generate(
            requests,
            on_finished=lambda found: reported.update(rollout.prompt_id for rollout in found),
            place=lambda number: f"file:{number + 1}",
        )
    return reported


@pytest.mark.parametrize("name", ["one", "TP2", "PP2", "DP2"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_no_numbers_end_all_ranks_by_the_prompt(name: str, bad: float, worlds: Worlds) -> None:
    size, layout = LAYOUTS.get(name, (1, {}))
    for reported in worlds.run(size, drawn_by_bad_scores, layout, bad):
        assert 2 not in reported
