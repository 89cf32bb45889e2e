"""The code blocks of the documentation, by kind.

A block that cannot be checked has a comment above it that says why, `<!-- not checked: REASON -->`, and one of Python
that is checked but cannot run `<!-- not run: REASON -->`. Readers do not see them, on the forge or on the site.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "examples").glob("*/README.md")),
]
KINDS = ("bash", "python", "yaml", "json", "toml", "text")

_FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_MARKER = re.compile(r"<!-- not (checked|run): ([^>]*?) -->\s*$")
_HEREDOC = re.compile(r"<<-?\s*'?(\w+)'?.*?^\1$", re.MULTILINE | re.DOTALL)
_INNER = re.compile(r"\$\(([^()]*)\)")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")


@dataclass(frozen=True)
class Block:
    """A code block.

    Attributes:
        page: path of its page in the repository.
        line: line of its first fence.
        kind: its language.
        text: its content.
        reason: why it cannot be checked; empty if it is checked.
        unrun: why it cannot run; empty if it can.
    """

    page: str
    line: int
    kind: str
    text: str
    reason: str = ""
    unrun: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a shell: its variables, and its words."""

    variables: dict[str, str]
    words: list[str]

    def __str__(self) -> str:
        return " ".join(self.words)


def blocks_of(page: str, text: str) -> Iterator[Block]:
    """Yield the blocks of a page."""
    for found in _FENCE.finditer(text):
        marker = _MARKER.search(text[: found.start()])
        content = re.sub(rf"^{found[1]}", "", found[3], flags=re.MULTILINE)
        line = text.count("\n", 0, found.start()) + 1
        reasons = {marker[1]: marker[2]} if marker else {}
        yield Block(page, line, found[2], content, reasons.get("checked", ""), reasons.get("run", ""))


def all_blocks() -> list[Block]:
    return [
        block for page in PAGES for block in blocks_of(str(page.relative_to(ROOT)), page.read_text(encoding="utf-8"))
    ]


def commands_of(script: str) -> Iterator[Command]:
    """Yield the commands of a block of shell, those inside $(...) too. Redirections are left out."""
    script = _HEREDOC.sub("< HEREDOC", script.replace("\\\n", " "))
    for inner in _INNER.findall(script):
        yield from commands_of(inner)
    for line in _INNER.sub("SUBSTITUTED", script).splitlines():
        reader = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        reader.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in [*reader, ";"]:
            if skip:
                skip = False
            elif set(word) <= {"<", ">"}:
                skip = True
            elif set(word) <= {"&", "|", ";"}:
                yield from _command(words)
                words = []
            else:
                words.append(word)


def _command(words: list[str]) -> Iterator[Command]:
    variables = {}
    while words and _ASSIGNMENT.match(words[0]):
        name, _, value = words[0].partition("=")
        variables[name] = value
        words = words[1:]
    if words:
        yield Command(variables, words)
