"""The countdown task: what an expression is worth, and problems that have a solution."""

import re
from fractions import Fraction

import pytest

from megarl.errors import ConfigError
from megarl.tasks.countdown import demonstrations, held_out, prompts, solved, solves, value_of
from tests.refusals import refused


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3*5+7", 22),
        ("3+5*7", 38),
        ("(3+5)*7", 56),
        ("10-3-2", 5),
        ("8/4/2", 1),
        ("7/2", Fraction(7, 2)),
        ("2*(3-(4-5))", 8),
        (" 1 + 2 ", 3),
        ("((7))", 7),
    ],
)
def test_expressions_have_the_usual_value(expression: str, value: Fraction) -> None:
    assert value_of(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "+", "3+", "-3", "3**5", "3 5", "3//5", "(3", "3)", "()", "3(5)", "1/0", "1/(2-2)", "3,5", "3=3", "x"),
        *("__import__('os')", "3+5;", "(" * 5000, "1" + "+1" * 3 + ")" * 3),
    ],
)
def test_what_is_not_an_expression_has_no_value(expression: str) -> None:
    assert value_of(expression) is None


def test_deep_nesting_is_read_without_recursion() -> None:
    assert value_of("(" * 5000 + "3" + ")" * 5000) == 3


def test_each_number_is_used_exactly_once() -> None:
    assert solves("3*5+7", [3, 5, 7], 22)
    assert solves("7+5*3", [3, 5, 7], 22)
    assert solves("(7+15)", [7, 15], 22)
    assert not solves("3*5+7", [3, 5, 7, 1], 22), "one is not used"
    assert not solves("3*5+7+7-7", [3, 5, 7], 22), "one is used three times"
    assert not solves("22", [3, 5, 7], 22)
    assert not solves("35-13", [3, 5, 1, 3], 22), "digits are not put together"
    assert not solves("3*5-7", [3, 5, 7], 22)
    assert not solves("9" * 10_000 + "**" + "9" * 10_000, [3, 5, 7], 22)


def test_the_reward_reads_the_records_fields() -> None:
    outputs = ["3*5+7", "1+1", "oops"]
    assert solved(outputs=outputs, numbers=[[3, 5, 7], [1, 1], [1, 1]], target=[22, 2, 2]) == [1.0, 1.0, 0.0]


@pytest.mark.parametrize("options", [{}, {"numbers": 2}, {"numbers": 4, "largest": 20}])
def test_every_problem_has_the_solution_that_a_demonstration_without_noise_shows(options: dict[str, int]) -> None:
    shown = {record["prompt"]: record["completion"] for record in demonstrations(noise=0.0, **options)}
    for record in prompts(**options):
        assert solves(shown[record["prompt"]], record["numbers"], record["target"])
        assert record["prompt"] == f"{' '.join(map(str, record['numbers']))}>{record['target']}="


@pytest.mark.parametrize(("count", "largest", "most"), [(3, 9, 6), (5, 99, 15), (2, 12, 6)])
def test_prompts_and_solutions_are_as_long_as_the_preset_says(count: int, largest: int, most: int) -> None:
    shown = demonstrations(numbers=count, largest=largest)
    assert max(len(record["prompt"]) for record in shown) == most + 3
    assert max(len(record["completion"]) for record in shown) == most - 1


def test_held_out_problems_have_a_solution() -> None:
    for record in held_out():
        a, b, c = record["numbers"]
        operators = [(one, two) for one in "+-*" for two in "+-*"]
        values = [value_of(f"{a}{one}{b}{two}{c}") for one, two in operators]
        assert record["target"] in values


@pytest.mark.parametrize("options", [{}, {"numbers": 2}, {"seed": 9}])
def test_no_held_out_problem_is_trained_on_in_any_order(options: dict[str, int]) -> None:
    def kinds(records: list[dict[str, object]]) -> set[tuple[object, ...]]:
        return {(*sorted(record["numbers"]), record["target"]) for record in records}  # type: ignore[call-overload]

    kept = held_out(**options)
    assert not kinds(prompts(**options)) & kinds(kept)
    assert len(kinds(kept)) == len(kept) >= 20


def test_noise_leaves_the_numbers_and_changes_operators() -> None:
    given = {record["prompt"]: record for record in prompts()}
    shown = [(record["completion"], given[record["prompt"]]) for record in demonstrations(noise=1.0)]
    assert all(re.findall(r"\d+", text) == [str(number) for number in record["numbers"]] for text, record in shown)
    assert 0.05 < sum(solves(text, record["numbers"], record["target"]) for text, record in shown) / len(shown) < 0.3


@pytest.mark.parametrize(
    ("name", "value"), [("seed", 1.5), ("numbers", 1), ("numbers", 7), ("largest", 1), ("noise", -0.1), ("noise", None)]
)
def test_what_is_not_an_option_is_refused(name: str, value: object) -> None:
    for function in (prompts, held_out, demonstrations):
        with refused(ConfigError, key=f"data.options.{name}", value=value):
            function(**{name: value})  # type: ignore[arg-type]
