"""The ready-made functions, on texts whose scores can be counted by hand."""

from functools import partial
from typing import Any

import pytest

from megarl.rewards import RewardWorker
from megarl.rewards.builtin import exact_match, json_valid, last_number, length, numeric_match, regex, sentiment
from megarl.rewards.words import NEGATIVE, POSITIVE
from megarl.tasks.sentiment import train
from megarl.tokenizers import build_tokenizer


def test_length_counts_characters_words_or_tokens() -> None:
    outputs = ["one two", "\u00fc", ""]
    assert length(outputs) == [7.0, 1.0, 0.0]
    assert length(outputs, unit="words") == [2.0, 1.0, 0.0]
    assert length(outputs, build_tokenizer("bytes"), unit="tokens") == [7.0, 2.0, 0.0]


def test_length_with_a_target_is_best_there_and_falls_on_both_sides() -> None:
    assert length(["ab", "abcd", "abcdef", ""], target_length=4) == [-0.5, 0.0, -0.5, -1.0]


def test_regex_searches_matches_wholly_or_counts() -> None:
    outputs = ["<a>1\n2</a>", " <a></a> x", "none"]
    assert regex(outputs, pattern="<a>.*</a>") == [1.0, 1.0, 0.0]
    assert regex([*outputs, "\n<a>3</a> "], pattern="<a>.*</a>", mode="fullmatch") == [1.0, 0.0, 0.0, 1.0]
    assert regex(["a-A-a", ""], pattern="A", mode="count") == [1.0, 0.0]
    assert regex(["a-A-a", ""], pattern="A", mode="count", ignore_case=True) == [3.0, 0.0]


def test_exact_match_ignores_white_space_and_knows_several_answers() -> None:
    outputs = [" New \n York ", "new york", "Boston", "42"]
    answers: list[Any] = ["New York", "New York", ["Paris", "Boston"], 42]
    assert exact_match(outputs, answer=answers) == [1.0, 0.0, 1.0, 1.0]
    assert exact_match(outputs, goal=answers, field="goal", ignore_case=True) == [1.0, 1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 42.", 42.0),
        ("first 7, then 3 apples", 3.0),
        ("1,234.5 in all", 1234.5),
        ("1,2,3", 3.0),
        ("-3", -3.0),
        ("x = -.5", -0.5),
        ("\u22123", -3.0),
        ("7-3", 3.0),
        ("7 - 3", 3.0),
        ("(+7)", 7.0),
        ("$5", 5.0),
        ("1.5e3", 1500.0),
        ("\\boxed{12}", 12.0),
        ("#### 72", 72.0),
        ("version v2", None),
        ("none - at all.", None),
        ("", None),
        ("1e999", None),
    ],
)
def test_last_number(text: str, number: float | None) -> None:
    assert last_number(text) == number


def test_numeric_match_compares_numbers_not_texts() -> None:
    outputs = ["so 1,000", "4.0", "about 5", "no idea", "1000001"]
    answers: list[Any] = [1000, "2 + 2\n#### 4", 6, 7, 1000000]
    assert numeric_match(outputs, answer=answers) == [1.0, 1.0, 0.0, 0.0, 0.0]
    assert numeric_match(["0.333"], answer=["0.3333"], tolerance=0.01) == [1.0]


def test_json_valid_takes_one_value_and_nothing_else() -> None:
    outputs = ['{"a": 1, "b": [null]}', " [1, 2]\n", '{"a": 1} x', "{'a': 1}", "NaN", "", "[" * 100_000, '{"b": 1}']
    assert json_valid(outputs) == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    assert json_valid(outputs, required_keys=["a"]) == [1.0] + [0.0] * 7


def test_sentiment_counts_words_and_turns_negated_ones() -> None:
    texts = {
        "A great, funny film": 2 / 3,
        "Boring and TERRIBLE.": -2 / 3,
        "It is a film": 0.0,
        "not good": -1 / 2,
        "I didn\u2019t hate it": 1 / 2,
        "Not for me. Great music": 1 / 2,
        "not one of its many actors is good": 1 / 2,
        "good and bad": 0.0,
        "": 0.0,
    }
    assert sentiment(list(texts)) == pytest.approx(list(texts.values()))


def test_the_word_lists_do_not_contradict_each_other() -> None:
    assert not POSITIVE & NEGATIVE
    assert all(word.isalpha() and word.islower() for word in POSITIVE | NEGATIVE)
    assert min(len(POSITIVE), len(NEGATIVE)) > 100


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (partial(length, unit="lines"), "option unit='lines': use characters, words or tokens"),
        (partial(length, target_length=0), "option target_length=0"),
        (partial(length, target_length=[3]), "the prompt records have a field of that name"),
        (regex, "option pattern is not set"),
        (partial(regex, pattern=["a"]), "option pattern is a list, not a text; the prompt records"),
        (partial(regex, pattern="a", mode="find"), "option mode='find'"),
        (
            partial(exact_match, goal=["a"]),
            "exact_match needs the field 'answer' of the prompt records, which have goal",
        ),
        (numeric_match, "which have no other fields"),
        (partial(numeric_match, answer=["many"]), "the answer of sample 0 is 'many', which holds no number"),
        (partial(json_valid, required_keys="ab"), "use a list of keys"),
    ],
)
def test_options_that_cannot_work_say_so(function: Any, message: str) -> None:
    with pytest.raises((ValueError, KeyError)) as caught:
        function(outputs=["x"])
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "score"),
    [
        ("length", {"unit": "tokens"}, 2.0),
        ("regex", {"pattern": "4"}, 1.0),
        ("exact_match", {}, 1.0),
        ("numeric_match", {}, 1.0),
        ("json_valid", {}, 1.0),
        ("sentiment", {}, 0.0),
    ],
)
def test_each_runs_in_the_worker_beside_fields_it_does_not_use(
    name: str, options: dict[str, Any], score: float
) -> None:
    worker = RewardWorker(f"megarl.rewards.builtin:{name}", ("bytes", None), options=options, retries=0)
    with worker:
        assert worker.score(["p42"], ["p"], ["42"], {"answer": [42], "other": ["x"]}).values == [score]


def test_sentiment_tells_the_answers_of_its_preset_apart() -> None:
    scores = sentiment([record["completion"] for record in train()])
    assert {round(score, 3) for score in scores} == {-0.667, 0.0, 0.667}
    assert abs(sum(scores)) / len(scores) < 0.1
