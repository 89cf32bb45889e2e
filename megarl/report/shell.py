"""What all pages have: head, style, policy, header, sections with links to them, footer and script. One HTML file that
needs no network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import megarl
from megarl.report.markup import escape, section

REPORT, PLAN, COMPARE, SELFTEST = "megarl report", "megarl plan", "megarl compare", "megarl selftest"
"""The commands that write pages. Each replaces its own pages only."""
Section = tuple[str, str, str]
"""Identifier, heading (text) and content (HTML)."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page do: nothing that needs a network."""
_FOLDER = Path(__file__).resolve().parent


def mark(command: str) -> str:
    """Return the beginning of the element by which a command's pages are recognised."""
    return f'<meta name="generator" content="{command} '


def shell(command: str, title: str, introduction: str, sections: Sequence[Section]) -> str:
    """Return a whole page.

    Args:
        command: the command that writes it, one of those above.
        title: its title, as text.
        introduction: HTML below the title.
        sections: its sections; those without content are left out.
    """
    there = [one for one in sections if one[2]]
    links = "".join(f'<li><a href="#{identifier}">{escape(heading)}</a></li>' for identifier, heading, _ in there)
    body = "".join(section(identifier, heading, content) for identifier, heading, content in there)
    version, written = escape(megarl.__version__), time.strftime("%Y-%m-%d %H:%M:%S %z")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'{mark(command)}{version}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} - {command}</title><style>{_asset('page.css')}</style></head><body>"
        '<a class="skip" href="#main">Skip to the content</a>'
        f'<header><h1>{escape(title)}</h1>{introduction}</header><nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main id="main" tabindex="-1">{body}</main>'
        f"<footer><p>Written by megarl {version} at {written}. The file needs no network and may be moved.</p></footer>"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8").strip()
