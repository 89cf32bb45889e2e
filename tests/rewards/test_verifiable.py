"""Functions for answers that can be checked: many ways to write an answer, and texts that try to pass for one."""

import json
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from megarl.rewards import RewardWorker, combine
from megarl.rewards.expressions import last_value
from megarl.rewards.latex import last_boxed, normal_text, number_in
from megarl.rewards.sandbox import SandboxError, working_isolation
from megarl.rewards.symbolic import end_process
from megarl.rewards.verifiable import arithmetic, boxed, json_schema, multiple_choice, python_tests, symbolic

# Arithmetic


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12", 12),
        ("The answer is 3*4.", 12),
        ("3 * 4 = 12", 12),
        ("12 = 3 * 4", 12),
        ("so x = (1 + 2) * (3 + 4)", 21),
        ("2 + 3 * 4", 14),
        ("(2 + 3) * 4", 20),
        ("2 ** 3 ** 2", 512),
        ("-2 ** 2", -4),
        ("2^10", 1024),
        ("7 // 2", 3),
        ("-7 // 2", -4),
        ("7 % 4", 3),
        ("1/3", Fraction(1, 3)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("1e3 + 1", 1001),
        ("1,234 + 1", 1235),
        ("5 \u00d7 6", 30),
        ("6 \u00f7 4", Fraction(3, 2)),
        ("5 \u2212 7", -2),
        ("--5", 5),
        ("3 \\times 4", 12),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("$2^{10}$", 1024),
        ("\\left(1 + 2\\right) \\cdot 3", 9),
        ("first 7, then 3 apples", 3),
        ("(see 3) 4", 4),
        ("**42**", 42),
        ("It costs $5.", 5),
        ("50%", 50),
        ("1\n2", 2),
        ("2) 5", 5),
        ("three dozen (that is 36)", 36),
        ("costs 36)", 36),
        ("answer: 7 (check: 3+4)", 7),
        ("(it is (1 + 2) * 3)", 9),
        ("((3 + 4))", 7),
        ("1) 2 * (2 + 3)", 10),
        ("half (about 50%)", 50),
        ("half (50%)", 50),
        ("1" * 3000, int("1" * 3000)),
        ("4 ** 0.5", 2),
        ("version v2", None),
        ("none", None),
        ("", None),
        ("1 / 0", None),
        ("9 ** 9 ** 9 ** 9", None),
        ("(" * 10_000 + "1" + ")" * 10_000, None),
        ("1e999999999", None),
        ("(-8) ** 0.5", None),
    ],
)
def test_last_value(text: str, value: Any) -> None:
    assert last_value(text) == value


def test_arithmetic_compares_values_not_texts() -> None:
    outputs = ["2 + 2", "I think it is 5", "1/3", "0.333", "none", "6 * 7 = 42"]
    answers: list[Any] = [4, "4", "2 / 6", "1/3", 1, 42.0]
    assert arithmetic(outputs, answer=answers) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    assert arithmetic(["0.333"], goal=["1/3"], field="goal", tolerance=0.01) == [1.0]


def test_arithmetic_runs_no_code_and_ends_soon() -> None:
    texts = [
        "__import__('os').system('touch /tmp/arithmetic')",
        "2 ** 99999999",
        "*".join(["99999"] * 50_000),
        "1+" * 100_000 + "1",
        "((((" * 50_000,
        "\\frac{" * 20_000,
        "9" * 100_000,
        "1 " * 50_000,
    ]
    start = time.process_time()
    assert arithmetic(texts, answer=[-1] * len(texts)) == [0.0] * len(texts)
    assert time.process_time() - start < 10
    assert not Path("/tmp/arithmetic").exists()


# Multiple choice


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "(B)",
        "B.",
        "B)",
        "**B**",
        "b",
        "(b)",
        "The answer is (B)",
        "The answer is B.",
        "the answer is b.",
        "Answer: B",
        "Answer: **B**",
        "**Answer:** B",
        "**Answer: B**",
        "The correct answer is **B**.",
        "The correct answer is option B",
        "The correct option is: (B) Paris",
        "Final answer: \\boxed{B}",
        "\\boxed{\\text{B}}",
        "$\\boxed{(B)}$",
        "\\boxed{\\textbf{(B) }}",
        "\\boxed{B. Paris}",
        "\\boxed{Paris}",
        "B. Paris",
        "(B) Paris",
        "B) Paris",
        "I choose B",
        "I would select option B because of the Seine",
        "My choice is B",
        "B is the correct answer",
        "(B) is correct",
        "Option B is the right one",
        "A is wrong. C is wrong. The answer is B.",
        "The answer is A. Wait, no. The answer is B.",
        "The answer is A\n\nActually, the answer is B",
        "A. London\nB. Paris\nC. Rome\nD. Bern\n\nThe answer is B.",
        "A. London\nB. Paris\nC. Rome\nD. Bern\n\nAnswer: B",
        "Let me think. It cannot be (A).\nSo (B)",
        "Since a city on the Seine is meant, it is Paris.",
        "paris",
        "I'd say Paris",
        "London is in England, so the capital is Paris.",
        "<answer>B</answer>",
        "The answer is $\\text{B}$",
        "The answer is therefore B",
        "ANSWER: B",
        "answer - B",
    ],
)
def test_a_choice_is_found_however_it_is_written(text: str) -> None:
    choices = ["London", "Paris", "Rome", "Bern"]
    assert multiple_choice([text] * 4, answer=["A", "B", "C", "D"], choices=[choices] * 4) == [0.0, 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I do not know.",
        "A. London\nB. Paris\nC. Rome\nD. Bern",
        "It is London or Paris, I cannot decide.",
        "E",
        "The answer is Z",
        "Berne",
        "The answer is a difficult matter",
        "Beautiful",
        "\\boxed{}",
    ],
)
def test_no_choice_is_read_into_a_text_without_one(text: str) -> None:
    choices = ["London", "Paris", "Rome", "Bern"]
    assert multiple_choice([text] * 4, answer=["A", "B", "C", "D"], choices=[choices] * 4) == [0.0] * 4


def test_the_answer_may_be_a_letter_a_position_or_a_text() -> None:
    answers: list[Any] = ["(b)", 1, "two", "B."]
    assert multiple_choice(["B"] * 4, answer=answers, shared_choices=["one", "two"]) == [1.0] * 4
    assert multiple_choice(["The answer is C"], answer=["C"]) == [1.0]


def test_records_with_and_without_choices_are_told_apart() -> None:
    own = [None, ["London", "Paris"], ("one", "two")]
    assert multiple_choice(["B", "Paris", "two"], answer=["B"] * 3, choices=own) == [1.0] * 3
    assert multiple_choice(["B", "The answer is C"], answer=["B", "C"], choices=[None, None]) == [1.0] * 2
    with pytest.raises(ValueError, match="the answer of sample 0 is 'two', which is no choice; without choices"):
        multiple_choice(["two", "two"], answer=["two", "two"], choices=[None, ["one", "two"]])


ARC = {"text": ["cold", "warm", "hot"], "label": ["A", "B", "C"]}


def test_choices_of_a_record_may_be_an_object_with_labels() -> None:
    numbered = {"text": ["cold", "warm"], "label": ["1", "2"]}
    shifted = {"text": ["2", "1"], "label": [1, 2]}
    own = [ARC, ARC, numbered, {"text": ["cold", "warm"]}, shifted]
    answers: list[Any] = ["C", "hot", "2", 1, 1]
    assert multiple_choice(["C", "so hot", "B", "warm", "A"], answer=answers, choices=own) == [1.0] * 5


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The answer is 2", 1.0),
        ("The answer is 2.", 1.0),
        ("The answer is **2** because it is mild.", 1.0),
        ("\\boxed{2}", 1.0),
        ("So I choose:\n(2)", 1.0),
        ("The answer is 1. No: the answer is 2", 1.0),
        ("The answer is B", 1.0),
        ("The answer is 1", 0.0),
        ("The answer is 5", 0.0),
        ("The answer is 2.5", 0.0),
        ("The answer is 25", 0.0),
        ("The answer is 2 degrees", 0.0),
        ("The answer is 2 + 1", 0.0),
        ("1. Read.\n2. Think about it", 0.0),
        ("There are 2", 0.0),
    ],
)
def test_labels_that_are_digits_may_be_stated(text: str, score: float) -> None:
    own = {"text": ["cold", "warm", "hot"], "label": ["1", "2", "3"]}
    assert multiple_choice([text], answer=["2"], choices=[own]) == [score]


def test_a_digit_is_no_label_where_the_text_of_a_choice_may_be_meant() -> None:
    own = {"text": ["2", "4"], "label": ["1", "2"]}
    assert multiple_choice(["The answer is 2"] * 2, answer=["1", "2"], choices=[own] * 2) == [1.0, 0.0]


def test_a_position_that_is_a_text_is_refused_with_what_a_position_is() -> None:
    with pytest.raises(ValueError, match=r"which is no choice; .*; a position is a number from 0, not a text"):
        multiple_choice(["B"], answer=["1"], shared_choices=["cold", "warm"])


def test_the_valid_letters_do_not_depend_on_the_other_samples_of_a_call() -> None:
    for count in (1, 2, 3, 4):
        scores = multiple_choice(["The answer is D"] * count, answer=["A"] * count, choices=[ARC] * count)
        assert scores == [0.0] * count
        with pytest.raises(ValueError, match="the answer of sample 0 is 'D', which is no choice; the choices are"):
            multiple_choice(["D"] * count, answer=["D"] * count, choices=[ARC] * count)


@pytest.mark.parametrize(
    "own",
    [
        "(A) cold (B) warm",
        '["cold", "warm"]',
        {"texts": ["cold", "warm"]},
        {"text": ["cold", "warm"], "label": ["A"]},
        {"text": ["cold", "warm"], "label": ["B", "A"]},
        {"text": "cold, warm", "label": "A, B"},
        [{"label": "A", "text": "cold"}, {"label": "B", "text": "warm"}],
        3,
    ],
)
def test_choices_that_cannot_be_read_are_refused_with_their_sample(own: Any) -> None:
    with pytest.raises(ValueError, match=r"the field 'choices' of sample 1 is .*: use a list of texts"):
        multiple_choice(["A"] * 2, answer=["A"] * 2, choices=[ARC, own])
    with pytest.raises(ValueError, match="shared_choices"):
        multiple_choice(["A"] * 2, answer=["A"] * 2, shared_choices=own)


def test_choices_of_all_records_are_an_option_of_their_own() -> None:
    for count in (1, 2, 3):
        with pytest.raises(ValueError, match="shared_choices"):
            multiple_choice(["A"] * count, answer=["A"] * count, choices=["cold", "warm"])
    assert multiple_choice(
        ["warm", "hot"], answer=["B", "C"], choices=[None, ARC], shared_choices=["cold", "warm"]
    ) == [
        1.0,
        1.0,
    ]


def test_the_last_of_contradictory_choices_counts() -> None:
    texts = ["\\boxed{A} no, \\boxed{B}", "The answer is B. The answer is C.", "\\boxed{B}. So the answer is D."]
    assert multiple_choice(texts, answer=["B", "C", "D"]) == [1.0] * 3


def test_choosing_ends_soon_on_long_texts() -> None:
    start = time.process_time()
    texts = ["answer is " * 20_000, "(" * 100_000, "A " * 50_000, "*" * 100_000, "\\boxed{" * 30_000, "\n\n" * 50_000]
    multiple_choice(texts, answer=["A"] * len(texts))
    assert time.process_time() - start < 10


# Boxes


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("\\boxed{5}", "5"),
        ("\\boxed{1} then \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{\\sqrt{2}}}", "\\frac{1}{\\sqrt{2}}"),
        ("\\boxed {x}", "x"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{3} and \\boxed{unclosed", "3"),
        ("\\fbox{4}", "4"),
        ("\\boxed 7.", "7"),
        ("\\boxed{}", ""),
        ("boxed{5}", None),
        ("5", None),
    ],
)
def test_last_boxed(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3/4", Fraction(3, 4)),
        ("\\frac{3}{4}", Fraction(3, 4)),
        ("\\dfrac34", Fraction(3, 4)),
        ("-\\tfrac{3}{4}", Fraction(-3, 4)),
        ("\\frac{-3}{4}", Fraction(-3, 4)),
        ("1\\frac{3}{4}", Fraction(7, 4)),
        ("1,234,567", 1234567),
        ("1{,}234", 1234),
        ("50\\%", Fraction(1, 2)),
        ("12.5%", Fraction(1, 8)),
        ("\\$5", 5),
        ("$5$", 5),
        ("x = 5", 5),
        ("\\text{5}", 5),
        ("5.", 5),
        (".5", Fraction(1, 2)),
        ("1.2 \\times 10^{3}", 1200),
        ("1e3", 1000),
        ("\u22125", -5),
        ("1/0", None),
        ("\\frac{1}{0}", None),
        ("(1, 2)", None),
        ("1,2", None),
        ("x", None),
        ("", None),
        ("9" * 3000, int("9" * 3000)),
        ("1e9999999", None),
    ],
)
def test_numbers_in_boxes(text: str, number: Any) -> None:
    assert number_in(normal_text(text)) == number


def test_boxed_compares_numbers_and_texts() -> None:
    pairs: list[tuple[str, Any, float]] = [
        ("so \\boxed{\\frac{1}{2}}", "0.5", 1.0),
        ("\\boxed{0.5}", "\\frac12", 1.0),
        ("\\boxed{50\\%}", "1/2", 1.0),
        ("\\boxed{1,000}", 1000, 1.0),
        ("\\boxed{ \\left( 1,\\, 2 \\right) }", "(1,2)", 1.0),
        ("\\boxed{\\text{Monday}}", "Monday", 1.0),
        ("\\boxed{x^2+1}", "The answer: \\boxed{x^2 + 1}", 1.0),
        ("\\boxed{7}", ["6", "7"], 1.0),
        ("\\boxed{1} no \\boxed{2}", "1", 0.0),
        ("\\boxed{6}", ["7", "8"], 0.0),
        ("5", "5", 0.0),
        ("\\boxed{}", "", 0.0),
        ("\\boxed{5 cm}", "5", 0.0),
        ("\\boxed{Tuesday}", "Monday", 0.0),
    ]
    outputs, answers, scores = zip(*pairs, strict=True)
    assert boxed(outputs, answer=list(answers)) == list(scores)


@pytest.mark.parametrize("answer", [None, {"a": 1}, [], [{"a": 1}], ["1", None]])
def test_boxed_refuses_an_answer_that_is_no_text_or_number(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"the answer of sample 1 is .*, which is no answer: use a text, a number"):
        boxed(["\\boxed{1}"] * 2, answer=["1", answer])


def test_units_that_are_named_do_not_count() -> None:
    outputs = ["\\boxed{5\\text{ cm}}", "\\boxed{5\\ \\mathrm{cm}^2}", "\\boxed{90^\\circ}", "\\boxed{5 m}"]
    units = ["cm", "cm^2", "^\\circ"]
    assert boxed(outputs, answer=["5", "5", "90", "5"], units=units) == [1.0, 1.0, 1.0, 0.0]


def test_boxes_end_soon_on_long_texts() -> None:
    start = time.process_time()
    texts = [
        "\\boxed{" * 10_000,
        "\\boxed{" + "{" * 100_000,
        "\\boxed{" + "\\text{" * 600 + "}" * 601,
        "\\frac" * 50_000,
    ]
    boxed(texts, answer=["1"] * len(texts))
    assert time.process_time() - start < 10


# Formulas


def test_symbolic_compares_formulas_mathematically() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed (the extra verify)")
    outputs = ["$\\frac{\\sqrt{8}}{2}$", "\\boxed{(x+1)^2}", "$x^2 + 2x$", "no formula", "\\boxed{[1, 2)}"]
    answers = ["$\\sqrt{2}$", "x^2 + 2x + 1", "$x^2$", "$7$", "$[1,2)$"]
    scores = symbolic(outputs, answer=answers, timeout=60)
    assert scores == {"symbolic": [1.0, 1.0, 0.0, 0.0, 1.0], "timed_out": [0.0] * 5, "crashed": [0.0] * 5}


@pytest.mark.parametrize(
    ("answer", "options", "named"),
    [
        (None, {}, "answer of sample 0 is missing"),
        ("x", {"timeout": -1}, "timeout=-1: use a number above 0"),
        ("x", {"budget": 0}, "budget=0: use a number above 0"),
    ],
)
def test_symbolic_refuses_a_missing_answer_and_limits_that_nothing_meets(
    answer: str | None, options: dict[str, float], named: str
) -> None:
    with pytest.raises(ValueError, match=named):
        symbolic(["$x$"], answer=[answer], **options)


def test_symbolic_stops_what_does_not_end() -> None:
    pytest.importorskip("math_verify", reason="math-verify is not installed (the extra verify)")
    scores = symbolic(["$9^{9^{9^{9}}}$"], answer=["$7^{9^{9^{8}}}$"], timeout=2)
    assert scores == {"symbolic": [0.0], "timed_out": [1.0], "crashed": [0.0]}
    assert symbolic(["$2$"], answer=["$2$"], timeout=60)["symbolic"] == [1.0]


@pytest.fixture
def math_verify_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A stand-in for math-verify that compares texts, and does what the text `sleep`, `exit` or `memory` says."""
    (tmp_path / "math_verify.py").write_text(
        "import os, time\n"
        "def parse(text, parsing_timeout):\n    text = text.strip('$')\n"
        "    if text == 'sleep': time.sleep(1000)\n    if text == 'exit': os._exit(3)\n"
        "    if text == 'memory': raise MemoryError\n    if text == 'error': raise ValueError\n    return [text]\n"
        "def verify(gold, found, timeout_seconds): return gold == found\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "math_verify", raising=False)
    end_process()
    yield
    end_process()
    sys.modules.pop("math_verify", None)


def test_symbolic_tells_what_is_late_from_what_crashes(math_verify_that_fails: None) -> None:
    outputs = ["a", "exit", "a", "memory", "b", "error", "a"]
    scores = symbolic(outputs, answer=["a"] * 7, timeout=60)
    assert scores["symbolic"] == [1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0]
    assert scores["crashed"] == [0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0]
    assert scores["timed_out"] == [0.0] * 7
    late = symbolic(["sleep"], answer=["a"], timeout=0.5)
    assert late == {"symbolic": [0.0], "timed_out": [1.0], "crashed": [0.0]}


def test_symbolic_tries_no_more_responses_once_undecided_ones_have_used_up_the_budget(
    math_verify_that_fails: None,
) -> None:
    outputs = ["a", "sleep", "a", "sleep", *["sleep"] * 50, "a"]
    start = time.monotonic()
    scores = symbolic(outputs, answer=["a"] * len(outputs), timeout=0.5, budget=0.3)
    assert time.monotonic() - start < 20, "far less than the time-outs and restarts of all of them"
    assert scores["symbolic"] == [1.0] + [0.0] * (len(outputs) - 1)
    assert scores["timed_out"] == [0.0] + [1.0] * (len(outputs) - 1)
    later = symbolic(["a", "exit", "a"], answer=["a"] * 3, timeout=60, budget=1e-9)
    assert later == {"symbolic": [1.0, 0.0, 0.0], "timed_out": [0.0, 0.0, 1.0], "crashed": [0.0, 1.0, 0.0]}


def test_symbolic_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match="megarl\\[verify\\]"):
        symbolic(["1"], answer=["1"])


# JSON


SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer", "minimum": 0}},
    "required": ["name"],
    "additionalProperties": False,
}


def test_json_schema_takes_what_the_schema_allows(tmp_path: Path) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed (the extra verify)")
    outputs = [
        '{"name": "a", "age": 3}',
        '{"name": "a"}',
        '{"age": 3}',
        '{"name": "a", "age": -1}',
        '{"name": "a", "more": 1}',
        '{"name": "a"} and more',
        "none",
        "",
        "NaN",
        "[" * 100_000,
    ]
    scores = [1.0, 1.0] + [0.0] * 8
    file = tmp_path / "schema.json"
    file.write_text(json.dumps(SCHEMA))
    assert json_schema(outputs, schema=SCHEMA) == scores
    assert json_schema(outputs, schema=str(file)) == scores
    column = [SCHEMA, json.dumps({"type": "null"})]
    assert json_schema(['{"name": "a"}', "null"], schema=column) == [1.0, 1.0]
    assert json_schema(["null", '{"name": "a"}'], schema=column) == [0.0, 0.0]


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        (None, "option schema is not set"),
        ({"type": "strin"}, "option schema is no JSON schema: at type"),
        (5, "which is no JSON schema"),
        ("missing.json", "option schema='missing.json': not a file with JSON"),
        ([{"type": 3}], "the schema of sample 0 is no JSON schema"),
        (["{'type': 'null'}"], "the schema of sample 0 is \"{'type': 'null'}\", which is not JSON"),
        (["[" * 100_000], "the schema of sample 0 is '[[["),
        ({"$ref": "https://example.com/schema.json"}, "a $ref leads nowhere"),
    ],
)
def test_an_unusable_schema_is_refused(schema: Any, message: str) -> None:
    pytest.importorskip("jsonschema", reason="jsonschema is not installed (the extra verify)")
    with pytest.raises((ValueError, TypeError)) as caught:
        json_schema(["{}"], schema=schema)
    assert message in str(caught.value)


def test_json_schema_names_the_extra_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    with pytest.raises(ImportError, match="megarl\\[verify\\]"):
        json_schema(["1"], schema={})


# All of them


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (partial(arithmetic, answer=["many"]), "the answer of sample 0 is 'many', which has no value"),
        (partial(arithmetic, goal=[1]), "arithmetic needs the field 'answer'"),
        (partial(multiple_choice, answer=["Lyon"], shared_choices=["Paris"]), "which is no choice; the choices are"),
        (partial(multiple_choice, answer=[7], shared_choices=["Paris"]), "which is no choice"),
        (partial(multiple_choice, answer=["Paris"]), "without choices it must be a letter"),
        (partial(boxed, answer=["1"], units="cm"), "use a list of texts"),
        (boxed, "boxed needs the field 'answer'"),
        (partial(arithmetic, answer=[1], tolerance="x"), "option tolerance is a str"),
    ],
)
def test_options_and_fields_that_cannot_work_say_so(function: Any, message: str) -> None:
    with pytest.raises((ValueError, KeyError)) as caught:
        function(outputs=["x"])
    assert message in str(caught.value)


def test_a_missing_field_is_named_beside_the_fields_that_records_have() -> None:
    given = {"samples": ["px"], "prompts": ["p"], "outputs": ["x"], "tokenizer": None, "answer": [1], "level": [2]}
    with pytest.raises(KeyError, match=r"which have answer, level; name the field to read with reward\.options\.field"):
        arithmetic(**given, field="target")


def test_memory_in_which_python_cannot_start_is_refused() -> None:
    with pytest.raises(ValueError, match="option memory_mb=1: Python needs more to start; use 32 or more"):
        python_tests(["x = 1"], tests=["assert x == 1"], memory_mb=1)


def test_the_least_memory_is_enough_for_python_and_its_tests() -> None:
    try:
        working_isolation()
    except SandboxError as error:
        pytest.skip(f"this kernel allows no sandbox: {error}")
    case = "import unittest\nclass T(unittest.TestCase):\n    def test_f(self): self.assertEqual(f(), 1)\n"
    assert python_tests(["def f(): return 1"], tests=[case], memory_mb=32)["passed"] == [1.0]


def test_verifiable_rewards_run_in_the_worker_and_in_combine() -> None:
    try:
        working_isolation()
    except SandboxError as error:
        pytest.skip(f"this kernel allows no sandbox: {error}")
    parts = ["megarl.rewards.verifiable:arithmetic", "megarl.rewards.verifiable:python_tests"]
    with RewardWorker(combine(parts, weights=[1, 2]), ("bytes", None), timeout_s=120, retries=0) as worker:
        metadata = {"answer": [4], "tests": [[{"input": "", "output": "4"}]], "other": [None]}
        scores = worker.score(["p"], ["p"], ["print(2 + 2)"], metadata)
    assert scores.parts["arithmetic"] == [1.0]
    assert scores.parts["python_tests"] == [1.0]
    assert scores.parts["python_tests/passed"] == [1.0]
    assert scores.values == [3.0]
