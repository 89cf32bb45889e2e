"""Tokens of a few responses with what training computed for each: log-probs before and after, values, advantages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megarl.command import printable
from megarl.report.data import RunData, as_number
from megarl.report.markup import NOTHING, as_script, escape, folded, number, table
from megarl.report.responses import by_step

_MOST_RESPONSES, _MOST_TOKENS = 4, 256
_NEW, _OLD, _REFERENCE = "new_logprobs", "old_logprobs", "ref_logprobs"
_COLUMNS = {
    "advantages": "advantage",
    "values": "value",
    "returns": "return",
    _OLD: "log-prob before",
    _NEW: "log-prob after",
    "weights": "weight",
}
EXPLAINED = (
    '<p class="definition">Responses of the first and of the last traced phase, from the best score to the worst. A '
    "bar under a token stands for a positive number, a bar over it for a negative one; the darker, the larger. The "
    "shift of a phase is the log-prob after its training minus the one before. The shift from the reference is the "
    "log-prob before this training minus that of the reference. A token with a positive advantage is to become more "
    "likely.</p>"
    '<div class="control" hidden><label for="quantity">Show</label><select id="quantity"></select></div>'
)
"""What stands above the responses of all runs, with the control of what their bars show."""
_ESCAPES = {"\n": "⏎\n", "\t": "⇥", "\r": "␍"}


@dataclass(frozen=True)
class Quantity:
    """A number of each token.

    Attributes:
        name: what it is, as text.
        values: one per token; None where it is not finite or not known.
        signed: whether its sign is its meaning.
    """

    name: str
    values: Sequence[float | None]
    signed: bool


def tokens(run: RunData, level: int) -> str:
    """Return the traced responses of the first and of the last traced phase; empty if there are none.

    Args:
        run: the run.
        level: level of the phases' headings.
    """
    phases = by_step(run.traces)
    if not phases:
        return ""
    parts = []
    for phase in sorted({min(phases), max(phases)}):
        found = [_trace(trace, level + 1, index) for index, trace in enumerate(phases[phase][:_MOST_RESPONSES], 1)]
        parts.append(f"<h{level}>Phase {phase}</h{level}>{''.join(found)}")
    return "".join(parts)


def quantities(trace: Mapping[str, Any]) -> list[Quantity]:
    """Return the numbers of a trace's tokens, the shifts of their log-probs among them."""
    count = len(_texts(trace))
    found = {name: _numbers(trace.get(name), count) for name in (*_COLUMNS, _REFERENCE)}
    shifts = (
        Quantity("log-prob shift of this phase", _difference(found[_NEW], found[_OLD]), True),
        Quantity("log-prob shift from the reference", _difference(found[_OLD], found[_REFERENCE]), True),
    )
    rest = [Quantity(label, found[name], "log-prob" not in label) for name, label in _COLUMNS.items()]
    return [one for one in (rest[0], *shifts, *rest[1:]) if any(value is not None for value in one.values)]


def _trace(trace: Mapping[str, Any], level: int, index: int) -> str:
    texts = _texts(trace)[:_MOST_TOKENS]
    shown = [Quantity(one.name, one.values[: len(texts)], one.signed) for one in quantities(trace)]
    known = as_number(trace.get("score"))
    score = "" if known is None else f", score {number(known)}"
    heading = f"<h{level}>Response {index}{score}</h{level}>"
    prompt = f"<pre>{escape(str(trace.get('prompt', ''))[-2000:]) or '<em>empty</em>'}</pre>"
    if not shown or not texts:
        return f'<article class="sample">{heading}{prompt}<p>Nothing is known of its tokens.</p></article>'
    length = trace.get("length")
    more = (
        f'<p class="caveat">The first {len(texts)} of {length} tokens.</p>'
        if isinstance(length, int) and length > len(texts)
        else ""
    )
    spans = "".join(f"<span>{_visible(text)}</span>" for text in texts)
    data = as_script(
        {
            "tokens": [printable(text) for text in texts],
            "quantities": [{"name": one.name, "values": one.values, "signed": one.signed} for one in shown],
        }
    )
    rows = [
        [f"{place} <code>{_visible(text)}</code>", *(_cell(one.values[place - 1]) for one in shown)]
        for place, text in enumerate(texts, 1)
    ]
    values = table("Numbers of each token", ["token", *(escape(one.name) for one in shown)], rows)
    reader = (
        f'<input class="reader" type="range" min="0" max="{len(texts) - 1}" value="0" hidden aria-label="token of '
        f'response {index} to read"><p class="readout" aria-hidden="true"></p>'
    )
    return (
        f'<article class="sample trace">{heading}{prompt}<pre class="tokens">{spans}</pre>{reader}{more}{data}'
        f"{folded('Values', values)}</article>"
    )


def _texts(trace: Mapping[str, Any]) -> list[str]:
    """Return the texts of a trace's tokens; one that is no text is empty."""
    tokens = trace.get("tokens")
    return [text if isinstance(text, str) else "" for text in tokens] if isinstance(tokens, list) else []


def _visible(text: str) -> str:
    """Return a token's text with signs for the characters that are not seen."""
    return escape("".join(_ESCAPES.get(letter, letter) for letter in text)) or "·"


def _numbers(values: Any, count: int) -> list[float | None]:
    """Return `count` finite numbers or None; all None where there are no values."""
    known = values if isinstance(values, list) else []
    return [as_number(known[index]) if index < len(known) else None for index in range(count)]


def _difference(ours: Sequence[float | None], theirs: Sequence[float | None]) -> list[float | None]:
    pairs = zip(ours, theirs, strict=True)
    return [None if a is None or b is None else as_number(float(f"{a - b:.5g}")) for a, b in pairs]


def _cell(value: float | None) -> str:
    return NOTHING if value is None else number(value)
