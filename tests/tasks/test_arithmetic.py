"""The arithmetic task: right answers, questions that are kept back, and noise in demonstrations."""

import pytest

from megarl.errors import ConfigError
from megarl.tasks.arithmetic import answer_of, correct, demonstrations, held_out, prompts
from tests.refusals import refused


def terms(prompt: str) -> tuple[int, ...]:
    return tuple(int(term) for term in prompt.removesuffix("=").split("+"))


def test_answers_are_sums_from_the_last_digit_to_the_first() -> None:
    assert answer_of((17, 25)) == "24"
    assert answer_of((99, 99)) == "891"
    for record in [*prompts(), *held_out(digits=3, terms=4)]:
        assert int(record["answer"][::-1]) == sum(terms(record["prompt"]))


def test_numbers_and_terms_are_as_many_as_the_options_say() -> None:
    for record in prompts(digits=3, terms=4):
        assert [len(str(term)) for term in terms(record["prompt"])] == [3] * 4
    assert {len(terms(record["prompt"])) for record in held_out(digits=1)} == {2}


@pytest.mark.parametrize(("digits", "count"), [(2, 2), (8, 2), (3, 9)])
def test_prompts_and_answers_are_as_long_as_the_preset_says(digits: int, count: int) -> None:
    records = prompts(digits=digits, terms=count)
    assert {len(record["prompt"]) for record in records} == {count * (digits + 1)}
    assert max(len(record["answer"]) for record in records) == digits + 1


@pytest.mark.parametrize("options", [{}, {"digits": 1}, {"digits": 2, "terms": 3}, {"seed": 9}])
def test_no_held_out_question_is_trained_on_in_any_order(options: dict[str, int]) -> None:
    train = {tuple(sorted(terms(record["prompt"]))) for record in prompts(**options)}
    kept = [tuple(sorted(terms(record["prompt"]))) for record in held_out(**options)]
    cloned = {record["prompt"] for record in demonstrations(**options)}
    assert not train & set(kept)
    assert len(set(kept)) == len(kept) >= 11
    assert cloned == {record["prompt"] for record in prompts(**options)}


def test_the_share_of_wrong_demonstrations_is_the_noise() -> None:
    right = {record["prompt"]: record["answer"] for record in prompts()}
    for noise, low, high in ((0.0, 1.0, 1.0), (0.6, 0.37, 0.43), (1.0, 0.0, 0.0)):
        pairs = [(record["completion"], right[record["prompt"]]) for record in demonstrations(noise=noise)]
        assert low <= sum(given == answer for given, answer in pairs) / len(pairs) <= high
        assert all(sum(a != b for a, b in zip(given, answer, strict=True)) <= 1 for given, answer in pairs)


def test_the_seed_decides_everything() -> None:
    assert (prompts(), demonstrations()) == (prompts(), demonstrations())
    assert prompts(seed=2) != prompts(seed=1)


def test_the_reward_compares_with_the_records_answer() -> None:
    assert correct(outputs=["24", "42", "24 ", ""], answer=["24"] * 4, prompts=["17+25="] * 4) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("name", "value"),
    [("seed", -1), ("seed", True), ("digits", 0), ("digits", 10), ("terms", 1), ("terms", "2"), ("noise", 1.5)],
)
def test_what_is_not_an_option_is_refused(name: str, value: object) -> None:
    for function in (prompts, held_out, demonstrations):
        with refused(ConfigError, key=f"data.options.{name}", value=value):
            function(**{name: value})  # type: ignore[arg-type]
