"""Pieces of HTML: escaped text, numbers, tables and sections. All text of a page goes through `escape`."""

from __future__ import annotations

import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from megarl.command import printable

_PLAIN = re.compile(r"[A-Za-z_./~][^\s\"']*")
NOTHING = "\u2013"
"""An en dash: what stands where there is no value."""


def escape(value: object) -> str:
    """Return a value as text for HTML. Control characters are shown as escapes, so that a model's output stays text."""
    return html.escape(printable(str(value)), quote=True)


def number(value: object) -> str:
    """Return a number in a readable length; other values as text, None and numbers that are not finite by name."""
    if value is None:
        return NOTHING
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}" if abs(value) < 10**15 else f"{float(value):.4g}" if abs(value) < 10**300 else "huge"
    if not math.isfinite(value):
        return "not finite"
    if value == int(value) and abs(value) < 10**6:
        return f"{int(value):,}"
    return f"{value:,.0f}" if 10**4 <= abs(value) < 10**9 else f"{value:.4g}"


def seconds(value: object) -> str:
    """Return a duration in words of at most two units."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return NOTHING
    if value < 60:
        return f"{value:.3g} s"
    whole = round(value)
    for size, unit, below, lower in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {lower}"
    return f"{whole} s"


def in_markdown(text: str) -> str:
    """Return a line of Markdown as HTML: code in backticks stays code, of a link its text stays."""
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text).replace("\\|", "|")
    parts = plain.split("`")
    return "".join(f"<code>{escape(part)}</code>" if index % 2 else escape(part) for index, part in enumerate(parts))


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]], *, roomy: bool = False) -> str:
    """Return a table that scrolls within itself where it is wider than the screen.

    Args:
        caption: HTML of its caption.
        header, rows: HTML of the cells.
        roomy: whether its many columns need more room than a narrow screen has.
    """
    lines = [
        "<tr>"
        + "".join(f"<td>{cell}</td>" if index else f'<th scope="row">{cell}</th>' for index, cell in enumerate(row))
        for row in rows
    ]
    named = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    return (
        f'<div class="wide{" roomy" * roomy}"><table><caption>{caption}</caption><thead><tr>{named}</tr></thead>'
        f"<tbody>{''.join(f'{line}</tr>' for line in lines)}</tbody></table></div>"
    )


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return a list of names (text) with their values (HTML)."""
    return (
        '<dl class="facts">'
        + "".join(f"<div><dt>{escape(name)}</dt><dd>{value}</dd></div>" for name, value in pairs)
        + "</dl>"
    )


def section(identifier: str, heading: str, *content: str) -> str:
    """Return a section of the page with its heading (text)."""
    return (
        f'<section id="{identifier}" aria-labelledby="{identifier}-heading">'
        f'<h2 id="{identifier}-heading">{escape(heading)}</h2>{"".join(content)}</section>'
    )


def folded(summary: str, *content: str, identifier: str = "") -> str:
    """Return content that is folded until a reader opens it. `summary` is HTML."""
    named = f' id="{identifier}"' if identifier else ""
    return f"<details{named}><summary>{summary}</summary>{''.join(content)}</details>"


def as_script(content: Any, identifier: str = "") -> str:
    """Return data for the page's script, which no text in it can end."""
    named = f' id="{identifier}"' if identifier else ""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return f'<script type="application/json"{named}>{text}</script>'


def identifiers(prefix: str, names: Iterable[str]) -> dict[str, str]:
    """Return a different identifier for each name, made of its letters and digits."""
    found: dict[str, str] = {}
    used: set[str] = set()
    for name in names:
        base = prefix + (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed")
        chosen, count = base, 1
        while chosen in used:
            count += 1
            chosen = f"{base}-{count}"
        used.add(chosen)
        found[name] = chosen
    return found


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted keys. An empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def setting(value: Any) -> str:
    """Return the value of a key as it is written in JSON, a plain word without quotes. A very long one is shortened."""
    plain = isinstance(value, str) and _PLAIN.fullmatch(value) and value not in ("null", "true", "false")
    text = value if plain else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 400 else f"{text[:400]}… ({len(text):,} characters)"
