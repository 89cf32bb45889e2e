"""What the plan predicted for a run, beside what the run measured."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megarl.disk import UnreadableError, parse_object, read_text
from megarl.report.data import RunData
from megarl.report.markup import NOTHING, escape, number, seconds, table
from megarl.report.memory import COLOURS, in_words, memory_figure, peak_of

FILE = "plan.json"
"""Name of the prediction in a run folder."""
_PARTS = {"generate": "generate", "reward": "score", "score": "evaluate", "train": "train"}
"""The run's part of the time (`seconds` of summary.json) that a phase of the plan predicts."""
_LENGTH = "rollout/response_tokens"


@dataclass(frozen=True)
class PredictedRow:
    """A prediction beside a measurement.

    Attributes:
        what: what it is.
        predicted, measured: as they are shown.
        ratio: measured by predicted; None where the two cannot be compared.
    """

    what: str
    predicted: str
    measured: str
    ratio: float | None


def predicted(run: RunData, index: int) -> str:
    """Return the comparison of a run with its plan; empty if the run folder has no plan.

    Args:
        run: the run.
        index: number of the run on the page.
    """
    plan = read_plan(run)
    if plan is None:
        return ""
    rows = [one for one in (_memory(run, plan), *_times(run, plan), _tokens(run, plan), _length(run, plan)) if one]
    cells = [
        [
            escape(one.what),
            escape(one.predicted),
            escape(one.measured),
            NOTHING if one.measured == NOTHING else "not compared" if one.ratio is None else number(one.ratio),
        ]
        for one in rows
    ]
    header = ["what", "predicted", "measured", "measured / predicted"]
    said = "".join(f"<p>{escape(sentence)}</p>" for sentence in _sentences(run, plan))
    first = plan["ranks"][0]
    caption = "Predicted memory of the first process" if len(plan["ranks"]) > 1 else "Predicted memory of a process"
    marks = {"measured at the peak": measured} if _on_gpu(plan) and (measured := _peak(run)) else {}
    figure = memory_figure(f"predicted-memory-{index}", f"{caption}, by phase", first, marks)
    return table("The plan of this configuration and layout, and this run", header, cells) + said + figure


def read_plan(run: RunData) -> dict[str, Any] | None:
    """Return the content of plan.json; None if there is none, or one that megarl did not write."""
    try:
        plan = parse_object(read_text(run.path / FILE))
        for rank in plan["ranks"]:
            peak_of(rank)
            if not all(_is_size(role.get(part, 0)) for role in _roles(rank) for part in (*COLOURS, "host")):
                return None
        phases = {name: _positive(phase["seconds"]) for name, phase in plan["phases"].items()}
        whole = {"tokens": _positive(plan["tokens"]), "assumed": dict(plan["assumed"]), "notes": dict(plan["notes"])}
        known = [str(name) for name in plan["known_gpus"]]
        found = {**plan, **whole, "phases": phases, "known_gpus": known}
        json.dumps(found["ranks"][0], allow_nan=False)
    except (UnreadableError, LookupError, TypeError, ValueError, AttributeError):
        return None
    return found


def _roles(rank: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [role for phase in rank["phases"].values() for role in phase["roles"].values()]


def _memory(run: RunData, plan: Mapping[str, Any]) -> PredictedRow:
    phase, size = peak_of(plan["ranks"][0])
    measured = _peak(run)
    ratio = measured / size if measured is not None and size and _on_gpu(plan) else None
    return PredictedRow(
        "memory of the first process at its peak",
        f"{in_words(size)} in {phase}",
        NOTHING if measured is None else in_words(measured),
        ratio,
    )


def _times(run: RunData, plan: Mapping[str, Any]) -> list[PredictedRow]:
    """Return the seconds of each phase of the plan in a unit of work, on the mean over all."""
    parts, units = run.summary.get("seconds"), _number(run.summary, "steps")
    found = []
    for phase, expected in plan["phases"].items():
        wall = (
            _number(parts.get(_PARTS[phase]) if isinstance(parts, Mapping) else None, "wall_s")
            if phase in _PARTS
            else None
        )
        if wall is None or not units or (phase == "reward" and "reward" in plan["notes"]):
            continue
        measured = wall / units
        found.append(
            PredictedRow(
                f"{phase}, time of a {run.unit}",
                NOTHING if expected is None else seconds(expected),
                seconds(measured),
                None if not expected else measured / expected,
            )
        )
    return found


def _tokens(run: RunData, plan: Mapping[str, Any]) -> PredictedRow | None:
    """Return the tokens of the sequences of a unit of work: what is trained on once, prompts included."""
    pairs = [
        row["perf/tokens_per_second"] * row["perf/step_seconds"]
        for row in run.rows
        if "perf/tokens_per_second" in row and "perf/step_seconds" in row
    ]
    measured = _mean(pairs)
    if plan["tokens"] is None or measured is None:
        return None
    what = f"tokens of the sequences of a {run.unit}"
    return PredictedRow(what, number(round(plan["tokens"])), number(round(measured)), measured / plan["tokens"])


def _length(run: RunData, plan: Mapping[str, Any]) -> PredictedRow | None:
    assumed, measured = (
        _positive(plan["assumed"].get("response_tokens")),
        _mean([value for _, value in run.series(_LENGTH)]),
    )
    if assumed is None or measured is None:
        return None
    return PredictedRow("tokens of a response", number(assumed), number(measured), measured / assumed)


def _sentences(run: RunData, plan: Mapping[str, Any]) -> list[str]:
    """Return what the plan assumed, and why something is not compared."""
    assumed, known = plan["assumed"], ", ".join(plan["known_gpus"])
    found = []
    if "response_tokens" in assumed:
        found.append(
            f"The plan took prompts of {number(assumed.get('prompt_tokens'))} tokens and responses of the maximum "
            f"length, {number(assumed.get('response_tokens'))}; it does not read the data. Shorter ones have fewer "
            "tokens, and take less time."
        )
    elif "tokens_per_sequence" in assumed:
        found.append(
            f"The plan took sequences of the maximum length, {number(assumed['tokens_per_sequence'])} tokens; it does "
            "not read the data."
        )
    if not _on_gpu(plan):
        found.append(
            "Memory is not compared: without a GPU the measured number is the resident memory of the whole process, "
            "with Python, its libraries, freed memory that it keeps and the copies that a checkpoint takes. The plan "
            "counts the tensors of the models alone."
        )
    if plan.get("seconds_for") is None:
        here = "a GPU of another kind" if _on_gpu(plan) else "a CPU"
        found.append(f"Times are not predicted: this run used {here}, and the plan knows {known}.")
    elif plan["phases"]:
        found.append(f"Predicted times are those of {plan['seconds_for']}; measured are means, warm-up included.")
    return found


def _on_gpu(plan: Mapping[str, Any]) -> bool:
    return plan.get("device") == "gpu"


def _peak(run: RunData) -> float | None:
    """Return the measured peak in bytes."""
    peak = _number(run.summary, "peak_memory_gb")
    return None if peak is None else peak * 1e9


def _mean(values: list[float]) -> float | None:
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else None


def _number(mapping: Any, name: str) -> float | None:
    return _positive(mapping.get(name)) if isinstance(mapping, Mapping) else None


def _is_size(value: object) -> bool:
    return _positive(value) is not None or value == 0


def _positive(value: object) -> float | None:
    """Return a finite number above 0; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e300:
        return None
    return float(value)
