"""Links from the pages to lines of code: `python -m tests.doc_links` puts right those that have moved."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\[`([\w.]+)`\]\(\.\./([\w/]+\.py)#L\d+\)")


def line_of(name: str, file: Path) -> int:
    """Where a function, a class or `Class.method` begins."""
    lines = file.read_text(encoding="utf-8").splitlines()
    start = 0
    *outer, last = name.split(".")
    modules = (file.stem, file.parent.name)
    for part in [*(part for part in outer if part not in modules), last]:  # `last` may be a namesake of its module
        begins = re.compile(rf"\s*(?:def|class) {part}\b")
        start = next((number for number, line in enumerate(lines[start:], start + 1) if begins.match(line)), 0)
        if not start:
            raise ValueError(f"{file} defines no {name}")
    return start


def corrected(page: str) -> str:
    return _LINK.sub(lambda link: f"[`{link[1]}`](../{link[2]}#L{line_of(link[1], ROOT / link[2])})", page)


def main() -> None:
    for path in sorted((ROOT / "docs").glob("*.md")):
        before = path.read_text(encoding="utf-8")
        after = corrected(before)
        if after != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
