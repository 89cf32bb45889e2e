"""What all pages have: head, style, policy, header, sections with links to them, footer and script. One HTML file that
needs no network."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import megarl
from megarl.report.markup import escape, section

REPORT, PLAN, COMPARE, SELFTEST = "megarl report", "megarl plan", "megarl compare", "megarl selftest"
"""The commands that write pages. Each replaces its own pages only."""
WATCH = "megarl watch"
"""The command that serves pages."""
Section = tuple[str, str, str]
"""Identifier, heading (text) and content (HTML)."""
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
"""What a browser lets the page do: nothing that needs a network."""
_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Surroundings:
    """What a page has around its sections. The defaults are those of a file that stands alone.

    Attributes:
        policy: what a browser lets the page do.
        style: CSS after that of every page.
        header: HTML at the end of the header.
        end: HTML at the end of the page, after the script of every page.
        footer: HTML after the sentence that says when the page was written.
    """

    policy: str = POLICY
    style: str = ""
    header: str = ""
    end: str = ""
    footer: str = "The file needs no network and may be moved."


ALONE = Surroundings()
"""Those of a file that stands alone."""


def mark(command: str) -> str:
    """Return the beginning of the element by which a command's pages are recognised."""
    return f'<meta name="generator" content="{command} '


def shell(
    command: str,
    title: str,
    introduction: str,
    sections: Sequence[Section],
    around: Surroundings = ALONE,
) -> str:
    """Return a whole page.

    Args:
        command: the command that writes it, one of those above.
        title: its title, as text.
        introduction: HTML below the title.
        sections: its sections; those without content are left out.
        around: what the page has beside its sections.
    """
    there = [one for one in sections if one[2]]
    links = "".join(f'<li><a href="#{identifier}">{escape(heading)}</a></li>' for identifier, heading, _ in there)
    body = "".join(section(identifier, heading, content) for identifier, heading, content in there)
    version, written = escape(megarl.__version__), time.strftime("%Y-%m-%d %H:%M:%S %z")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'{mark(command)}{version}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{around.policy}">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{escape(title)} - {command}</title><style>{_asset('page.css')}{around.style}</style></head><body>"
        '<a class="skip" href="#main">Skip to the content</a>'
        f"<header>{head_of(title, introduction)}{around.header}</header>"
        f'<nav aria-label="Sections"><ul>{links}</ul></nav>'
        f'<main id="main" tabindex="-1">{body}</main>'
        f"<footer><p>Written by megarl {version} at {written}. {around.footer}</p></footer>"
        f"<script>{_asset('page.js')}</script>{around.end}</body></html>\n"
    )


def head_of(title: str, introduction: str) -> str:
    """Return the title (text) of a page with what stands below it (HTML)."""
    return f'<div id="head"><h1>{escape(title)}</h1>{introduction}</div>'


def _asset(name: str) -> str:
    return (_FOLDER / name).read_text(encoding="utf-8").strip()
