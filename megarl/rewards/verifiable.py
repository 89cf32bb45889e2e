"""Ready-made reward functions for answers that can be checked: numbers, choices, formulas, JSON and programs.

Like those of `builtin.py`, each is a plain function over the texts and the fields of the prompt records, with options
as keyword arguments.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from megarl.rewards.choices import chosen_letter
from megarl.rewards.expressions import equal, last_value, value_of
from megarl.rewards.fields import column_of, option_number, positive_number, strict_json
from megarl.rewards.latex import last_boxed, normal_text, number_in

_LEAST_MEMORY_MB = 32
"""Smallest memory of a sandbox. Python 3.11 starts in 14 MiB, and with unittest in 16; other builds may need more."""

_EXTRA = "install it with pip install 'megarl[verify]'"


def arithmetic(
    outputs: Sequence[str], *, field: str = "answer", tolerance: float = 1e-9, **metadata: Any
) -> list[float]:
    """Return 1 for each response whose last expression or number has the value of the answer, else 0.

    Expressions have + - * / // % ** and parentheses, and are computed exactly; nothing is evaluated as code.

    Args:
        field: field of the prompt records that holds the answer: a number, or a text that ends in an expression.
        tolerance: maximum difference, relative to the larger.
    """
    option_number("tolerance", tolerance)
    scores = []
    for row, (output, answer) in enumerate(zip(outputs, column_of(metadata, field, "arithmetic"), strict=True)):
        wanted = value_of(answer) if isinstance(answer, int | float) else last_value(str(answer))
        if wanted is None:
            raise ValueError(f"the {field} of sample {row} is {answer!r}, which has no value")
        found = last_value(output)
        scores.append(float(found is not None and equal(found, wanted, tolerance)))
    return scores


def multiple_choice(
    outputs: Sequence[str],
    *,
    field: str = "answer",
    choices: Sequence[object] | None = None,
    shared_choices: Sequence[object] | None = None,
    **metadata: Any,
) -> list[float]:
    """Return 1 for each response that chooses the answer's letter, else 0. The choice that it states last counts.

    Args:
        field: field of the prompt records that holds the answer: a letter; or, with choices, its label, its position
            from 0 or its text.
        choices: the field `choices` of the prompt records: a list of texts in the order of their letters, or an object
            with the lists `text` and `label`, as in ARC; null for a record without choices. With choices, a response
            may give the text instead of the letter, and labels that are digits unless a text has a digit too.
        shared_choices: list of the texts for all records without a field `choices`.
    """
    if choices is not None and (not isinstance(choices, list | tuple) or len(choices) != len(outputs)):
        raise ValueError(
            f"option choices={str(choices)[:60]!r}: choices are a field of the records; those that all records share "
            "are the option shared_choices"
        )
    shared = _read_choices(shared_choices, "option shared_choices")
    scores = []
    for row, (output, answer) in enumerate(zip(outputs, column_of(metadata, field, "multiple_choice"), strict=True)):
        own = None if choices is None else choices[row]
        texts, labels = shared if own is None else _read_choices(own, f"the field 'choices' of sample {row}")
        wanted = _letter_of(answer, texts, labels)
        if wanted is None:
            among = f"; the choices are {texts}" if texts else "; without choices it must be a letter"
            if texts and isinstance(answer, str) and answer.strip().isdigit():
                among += "; a position is a number from 0, not a text"
            raise ValueError(f"the {field} of sample {row} is {answer!r}, which is no choice{among}")
        scores.append(float(chosen_letter(output, texts, labels) == wanted))
    return scores


def _read_choices(value: object, what: str) -> tuple[list[str], list[str]]:
    """Return the texts of the choices, and their labels if they have some."""
    texts: object = [] if value is None else value
    labels: object = []
    if isinstance(value, Mapping):
        texts, labels = value.get("text"), value.get("label", [])
    if (
        not isinstance(texts, list | tuple)
        or not isinstance(labels, list | tuple)
        or len(labels) not in (0, len(texts))
        or not all(isinstance(one, str | int | float) for one in (*texts, *labels))
        or not _letters_in_order([str(label) for label in labels])
    ):
        raise ValueError(
            f"{what} is {str(value)[:60]!r}: use a list of texts in the order of their letters, or an object with the "
            "list text and, as long as it, the list label, whose letters are in order; the choices that all records "
            "share are the option shared_choices"
        )
    return [str(text) for text in texts], [str(label).strip() for label in labels]


def _letters_in_order(labels: Sequence[str]) -> bool:
    """Return whether no choice has the letter of another as its label: responses name the choices by letters."""
    letters = list(ascii_uppercase[: len(labels)])
    given = [label.strip().upper() for label in labels]
    return all(label == letter or label not in letters for label, letter in zip(given, letters, strict=False))


def _letter_of(answer: object, texts: Sequence[str], labels: Sequence[str]) -> str | None:
    text = str(answer).strip()
    if text in labels:
        return chr(ord("A") + labels.index(text))
    if isinstance(answer, int) and not isinstance(answer, bool):
        return chr(ord("A") + answer) if 0 <= answer < len(texts) else None
    if text in texts:
        return chr(ord("A") + texts.index(text))
    letter = text.strip("().:* ").upper()
    known = len(letter) == 1 and "A" <= letter <= "Z" and (not texts or ord(letter) - ord("A") < len(texts))
    return letter if known else None


def boxed(
    outputs: Sequence[str],
    *,
    field: str = "answer",
    units: Sequence[str] = (),
    tolerance: float = 1e-9,
    **metadata: Any,
) -> list[float]:
    r"""Return 1 for each response whose last \boxed{...} is the answer, as a number or as text, else 0.

    Numbers may be fractions (`3/4`, `\frac{3}{4}`, `1\frac{3}{4}`), percentages, and have commas between thousands.
    Texts are compared without white space, font commands and `\left`, `\right`.

    Args:
        field: field of the prompt records that holds the answer, in a box or not, or a list of answers of which any
            will do.
        units: texts that either may end in, such as cm or dollars.
        tolerance: maximum difference of numbers, relative to the larger.
    """
    option_number("tolerance", tolerance)
    if isinstance(units, str):
        raise ValueError(f"option units={units!r}: use a list of texts")
    scores = []
    for row, (output, answers) in enumerate(zip(outputs, column_of(metadata, field, "boxed"), strict=True)):
        found = last_boxed(output)
        wanted = answers if isinstance(answers, list | tuple) else [answers]
        if not wanted or not all(isinstance(one, str | int | float) for one in wanted):
            raise ValueError(
                f"the {field} of sample {row} is {str(answers)[:60]!r}, which is no answer: use a text, a number, or a "
                "list of such"
            )
        scores.append(float(found is not None and any(_same(found, str(one), units, tolerance) for one in wanted)))
    return scores


def _same(found: str, wanted: str, units: Sequence[str], tolerance: float) -> bool:
    box = last_boxed(wanted)
    texts = normal_text(found, units), normal_text(wanted if box is None else box, units)
    if texts[0] == texts[1]:
        return bool(texts[0])
    numbers = number_in(texts[0]), number_in(texts[1])
    return numbers[0] is not None and numbers[1] is not None and equal(numbers[0], numbers[1], tolerance)


def symbolic(
    outputs: Sequence[str], *, field: str = "answer", timeout: float = 5.0, budget: float = 30.0, **metadata: Any
) -> dict[str, list[float]]:
    """Return 1 for each response whose last formula equals the answer mathematically by math-verify, else 0.

    Needs the extra `verify`. It runs in a separate process, as computer algebra can hang and run out of memory. Two
    more components have 1 for each response that was not decided: `timed_out`, and `crashed`, where the process ended,
    as it does at 4 GiB of memory.

    Args:
        field: field of the prompt records that holds the answer: LaTeX or an expression.
        timeout: seconds for a response.
        budget: seconds that the responses of a call that were not decided may take together, with the restarts of the
            process. Once they have, the rest of the call is not tried and counts as timed out.
    """
    from megarl.rewards.symbolic import CRASHED, TIMED_OUT, decide

    for name, value in (("timeout", timeout), ("budget", budget)):
        positive_number(name, value)
    _optional("math_verify", "math-verify", "symbolic")
    answers = column_of(metadata, field, "symbolic")
    for row, answer in enumerate(answers):
        if answer is None:
            raise ValueError(f"the {field} of sample {row} is missing; it is LaTeX or an expression")
    verdicts = decide(outputs, [str(answer) for answer in answers], timeout, budget)
    for row, verdict in enumerate(verdicts):
        if verdict == "no answer":
            raise ValueError(f"the {field} of sample {row} is {metadata[field][row]!r}, which math-verify cannot read")
    return {
        "symbolic": [float(verdict == "equal") for verdict in verdicts],
        "timed_out": [float(verdict == TIMED_OUT) for verdict in verdicts],
        "crashed": [float(verdict == CRASHED) for verdict in verdicts],
    }


def json_schema(outputs: Sequence[str], *, schema: Any = None, **_: Any) -> list[float]:
    """Return 1 for each response that is one JSON value that a JSON schema allows, else 0.

    Needs the extra `verify`.

    Args:
        schema: the schema, or the path of a file with it; or a field of the prompt records of that name, which has a
            schema for each, as an object or as JSON text.
    """
    jsonschema = _optional("jsonschema", "jsonschema", "json_schema")
    if schema is None:
        raise ValueError("option schema is not set; it is a JSON schema, the path of one, or a field of the records")
    schemas = schema if isinstance(schema, list) else [_read_schema(schema)] * len(outputs)
    checkers: dict[str, Any] = {}
    scores = []
    for row, (output, one) in enumerate(zip(outputs, schemas, strict=True)):
        key = one if isinstance(one, str) else json.dumps(one, sort_keys=True)
        if key not in checkers:
            where = f"the schema of sample {row}" if isinstance(schema, list) else "option schema"
            checkers[key] = _checker(jsonschema, _parsed_schema(one, where), where)
        scores.append(float(_is_allowed(output, checkers[key])))
    return scores


def _read_schema(schema: object) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(Path(schema).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"option schema={schema!r}: not a file with JSON ({error}); use a path or a schema") from error


def _parsed_schema(schema: object, where: str) -> Any:
    if not isinstance(schema, str):
        return schema
    try:
        return json.loads(schema)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is {schema[:60]!r}, which is not JSON ({error}): use an object, or JSON") from error


def _checker(jsonschema: Any, schema: Any, where: str) -> Any:
    """Return a validator that fetches nothing from the network."""
    registry = importlib.import_module("referencing").Registry()
    if not isinstance(schema, Mapping | bool):
        raise ValueError(f"{where} is {schema!r}, which is no JSON schema: use an object")
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    try:
        kind.check_schema(schema)
        checker = kind(schema, registry=registry)
        _is_allowed("null", checker)
    except jsonschema.SchemaError as error:
        position = "/".join(map(str, error.absolute_path)) or "its top"
        raise ValueError(f"{where} is no JSON schema: at {position}, {error.message}") from error
    return checker


def _is_allowed(text: str, checker: Any) -> bool:
    unresolvable = importlib.import_module("referencing.exceptions").Unresolvable
    try:
        return bool(checker.is_valid(strict_json(text)))
    except unresolvable as error:
        raise ValueError(f"option schema: a $ref leads nowhere ({error}); include what it names in $defs") from error
    except (ValueError, RecursionError):
        return False


def python_tests(
    outputs: Sequence[str],
    *,
    field: str = "tests",
    partial: bool = False,
    timeout: float = 10.0,
    memory_mb: int = 512,
    processes: int = 32,
    workers: int = 4,
    entry_point: Any = None,
    **metadata: Any,
) -> dict[str, list[float]]:
    """Return 1 for each response whose Python code passes all tests, else 0. The code runs in a sandbox.

    Further components have 1 for each response that: passed, failed, timed_out, out_of_memory, killed, refused.

    Args:
        field: field of the prompt records that holds the tests: Python source with asserts, test functions or test
            cases; a list of such; or a list of {"input": ..., "output": ...} of a program.
        partial: the score is the share of the tests that pass.
        timeout: seconds for all tests of a response together.
        memory_mb: memory of the code's processes together, in MiB; at least 32.
        processes: processes and threads of the code at a time.
        workers: responses that are tested at the same time.
        entry_point: name of the function that a function `check` of the tests is given, or the field of that name.
    """
    from megarl.rewards.code_tests import OUTCOMES, check_responses, read_tests
    from megarl.rewards.sandbox import Limits

    for name, value in (("timeout", timeout), ("memory_mb", memory_mb), ("processes", processes), ("workers", workers)):
        positive_number(name, value)
    if memory_mb < _LEAST_MEMORY_MB:
        raise ValueError(f"option memory_mb={memory_mb}: Python needs more to start; use {_LEAST_MEMORY_MB} or more")
    names = entry_point if isinstance(entry_point, list | tuple) else [entry_point] * len(outputs)
    tests = []
    for row, (value, name) in enumerate(zip(column_of(metadata, field, "python_tests"), names, strict=True)):
        what = f"the field {field!r} of sample {row} is {str(value)[:60]!r}"
        try:
            read = read_tests(value, name)
        except SyntaxError as error:
            raise ValueError(f"{what}, which is not valid Python: {error}") from error
        if read is None:
            raise ValueError(
                f"{what}, which has no tests: use Python source, a list of such, or a list of objects with input and "
                "output"
            )
        tests.append(read)
    limits = Limits(wall_s=float(timeout), memory=int(memory_mb) << 20, processes=int(processes))
    verdicts = check_responses(outputs, tests, limits=limits, workers=int(workers), partial=partial)
    outcomes = {name: [float(verdict.outcome == name) for verdict in verdicts] for name in OUTCOMES}
    return {"python_tests": [verdict.score(partial) for verdict in verdicts], **outcomes}


def _optional(module: str, package: str, function: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{function} needs the package {package}, which is not installed: {_EXTRA}") from error
