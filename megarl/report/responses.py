"""What the model answered: samples of the first and the last evaluation side by side, and scores by phase."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megarl.report.data import RunData, step_of
from megarl.report.draw import heatmap
from megarl.report.markup import escape, folded, number, table
from megarl.report.scores import PhaseScores, quantile

_MOST_SAMPLES, _LONGEST = 12, 4_000
_STEPS = ("phase", "step")
_TEXTS = ("prompt", "response")
Sample = Mapping[str, Any]


def samples(run: RunData, level: int) -> str:
    """Return the samples of the first and of the last evaluation, prompt by prompt; empty if there are none.

    Args:
        run: the run.
        level: level of the prompts' headings.
    """
    evaluations = by_step(run.samples)
    if not evaluations:
        return ""
    first, last = min(evaluations), max(evaluations)
    before, after = _keyed(evaluations[first]), _keyed(evaluations[last])
    parts = []
    for index, (key, sample) in enumerate(after.items()):
        if index == _MOST_SAMPLES:
            parts.append(f"<p>{len(after) - index} more are in samples.jsonl.</p>")
            break
        sides = [(last, sample)] if first == last else [(first, before.get(key)), (last, sample)]
        answers = [_answer(f"{run.unit.capitalize()} {step}", level + 1, side) for step, side in sides]
        prompt = f"<pre>{_text(sample['prompt'])}</pre>" if "prompt" in sample else ""
        heading = f"<h{level}>Sample {index + 1}</h{level}>"
        parts.append(f'<article class="sample">{heading}{prompt}<div class="sides">{"".join(answers)}</div></article>')
    return "".join(parts)


def distribution(scores: Sequence[PhaseScores], identifier: str) -> str:
    """Return the distribution of the scores of the phases' responses, drawn and as a table; empty without scores."""
    if not scores:
        return ""
    rows, unit = [], "phase"
    for phase, values in scores:
        ordered = sorted(values)
        quantiles = [quantile(ordered, share) for share in (0, 0.25, 0.5, 0.75, 1)]
        rows.append([number(phase), number(len(ordered)), *map(number, quantiles)])
    first, last = scores[0], scores[-1]
    title = f"Distribution of scores, phases {first[0]} to {last[0]}"
    said = f"Median {rows[0][4]} in phase {first[0]} and {rows[-1][4]} in phase {last[0]}. The table has the quartiles."
    header = [unit, "responses", "lowest", "quarter below", "median", "quarter above", "highest"]
    drawn = heatmap(identifier, title, said, unit, scores)
    note = (
        "Each column is a phase; the stronger the colour of a field, the more of its responses have that score. "
        "Phases are counted from 0, and a run keeps the scores of those since its oldest checkpoint (all, with "
        "rollout.dump)."
    )
    return (
        f'<figure class="curve distribution"><figcaption class="definition">{note}</figcaption>{drawn}'
        f"{folded('Quartiles', table('Scores of the responses by phase', header, rows))}</figure>"
    )


def by_step(rows: Sequence[Sample]) -> dict[int, list[Sample]]:
    """Return the samples by step. A repeated evaluation or phase, as after a resume, replaces its earlier rows: those
    of traces begin with index 0."""
    found: dict[int, list[Sample]] = {}
    previous: int | None = None
    for row in rows:
        step = step_of(row)
        if not isinstance(step, int):
            continue
        if step != previous or row.get("index") == 0:
            found[step] = []
        found[step].append(row)
        previous = step
    return found


def _keyed(rows: Sequence[Sample]) -> dict[tuple[str, int], Sample]:
    """Return samples by their prompt, and by how often the prompt came before."""
    seen: dict[str, int] = {}
    found: dict[tuple[str, int], Sample] = {}
    for row in rows:
        prompt = str(row.get("prompt", ""))
        found[prompt, seen.get(prompt, 0)] = row
        seen[prompt] = seen.get(prompt, 0) + 1
    return found


def _answer(when: str, level: int, sample: Sample | None) -> str:
    heading = f"<h{level}>{when}</h{level}>"
    if sample is None:
        return f"<div>{heading}<p>This prompt was not among the samples.</p></div>"
    values = [(name, value) for name, value in sample.items() if name not in (*_STEPS, *_TEXTS)]
    shown = "".join(f"<div><dt>{escape(name)}</dt><dd>{_text(number(value))}</dd></div>" for name, value in values)
    response = f"<pre>{_text(sample['response'])}</pre>" if "response" in sample else ""
    return f'<div>{heading}{response}<dl class="facts">{shown}</dl></div>'


def _text(value: Any) -> str:
    text = str(value)
    more = f"… ({len(text):,} characters)" if len(text) > _LONGEST else ""
    return escape(text[:_LONGEST] + more) or "<em>empty</em>"
