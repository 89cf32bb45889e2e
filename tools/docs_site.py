"""Hooks of mkdocs for the documentation site (mkdocs.yml).

The pages in docs/ are written for the forge: they link files outside docs/, and CHANGELOG.md and CONTRIBUTING.md are at
the root. The hooks add these two pages, rewrite links that leave docs/, list external links in
`site/external_links.txt` without fetching any, and warn of a page that loads something from another server.
"""

from __future__ import annotations

import logging
import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ADDED = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
"""Files at the root that are pages of the site, by path."""
EXTERNAL_LINKS = "external_links.txt"

_FENCE = re.compile(r"^ *(`{3,}|~{3,}).*?^ *\1 *$", re.MULTILINE | re.DOTALL)
_CODE = re.compile(r"(`+)(?!`).*?\1")
_LINK = re.compile(r"(?<!!)\[((?:`[^`]*`|[^\[\]`])*)\]\(([^)\s]+)\)")
_TARGET = re.compile(r"""<a\b[^>]*\bhref=["'](https?://[^"'#]+[^"']*)["']""")
_LOADS = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|<link\b(?=[^>]*\brel=["']?(?:stylesheet|preconnect|preload|icon|modulepreload))[^>]*"""
    r"""\bhref=["']?((?:https?:)?//[^"'\s>]+)"""
    r"""|url\(["']?((?:https?:)?//[^"')]+)""",
    re.IGNORECASE,
)
_log = logging.getLogger("mkdocs.hooks.docs_site")  # mkdocs counts its warnings: with `strict` they fail the build
_external: dict[str, set[str]] = defaultdict(set)


def rewritten(
    text: str, source: str, repository: str | None, branch: str = "main", titles: Mapping[str, str] | None = None
) -> str:
    """Return a page whose links work on the site.

    Args:
        text: Markdown of the page.
        source: its path in the repository, as in docs/ppo.md.
        repository: address of the repository on its forge; None turns links to its files into text with their path.
        branch: branch that links to files lead to.
        titles: of pages by file; a link whose text is only a page's file gets the title as its text.
    """
    protected = sorted((each.span() for each in _FENCE.finditer(text)), key=lambda span: span[0])

    def rewrite(link: re.Match[str]) -> str:
        inside = any(start <= link.start() < end for start, end in protected)
        return link[0] if inside or _in_code(text, link.start()) else _rewritten(link, source, repository, branch)

    def name(link: re.Match[str]) -> str:
        return f"[{(titles or {}).get(link[1], link[1])}]({link[2]})"

    return _LINK.sub(name, _LINK.sub(rewrite, text)) if titles else _LINK.sub(rewrite, text)


def titles_of(nav: Any) -> dict[str, str]:
    """Return the titles of the navigation by file."""
    if isinstance(nav, list):
        return {file: title for entry in nav for file, title in titles_of(entry).items()}
    return {
        file: title
        for name, inside in nav.items()
        for file, title in (titles_of(inside) if isinstance(inside, list) else {inside: name}).items()
    }


def _in_code(text: str, position: int) -> bool:
    begin = text.rfind("\n", 0, position) + 1
    end = text.find("\n", position)
    line = text[begin : end if end >= 0 else len(text)]
    return any(code.start() <= position - begin < code.end() for code in _CODE.finditer(line))


def _rewritten(link: re.Match[str], source: str, repository: str | None, branch: str) -> str:
    label, target = link[1], link[2]
    path, _, anchor = target.partition("#")
    if not path or re.match(r"[a-z]+:", path):
        return link[0]
    whole = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
    added = f"#{anchor}" if anchor else ""
    if whole in ADDED:
        return f"[{label}]({ADDED[whole]}{added})"
    if whole.startswith("docs/"):
        return f"[{label}]({whole.removeprefix('docs/')}{added})"
    if whole.startswith("../") or not (ROOT / whole).exists():
        return link[0]  # mkdocs warns of it
    if repository:
        kind = "tree" if (ROOT / whole).is_dir() else "blob"
        return f"[{label}]({repository.rstrip('/')}/{kind}/{branch}/{whole}{added})"
    return label if whole in label else f"{label} (`{whole}`)"


def loaded_from_elsewhere(page: str) -> list[str]:
    """Return the addresses on other servers that a browser would load to show a page."""
    return [next(filter(None, groups)) for groups in _LOADS.findall(page)]


def listed(links: Mapping[str, set[str]]) -> str:
    """Return the external links, one a line with the pages that have it."""
    return "".join(f"{link}\t{' '.join(sorted(pages))}\n" for link, pages in sorted(links.items()))


def on_config(config: Any) -> Any:
    """Forget the links of an earlier build."""
    _external.clear()
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages at the root of the repository."""
    from mkdocs.structure.files import File

    for path, name in ADDED.items():
        files.append(File.generated(config, name, content=(ROOT / path).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Rewrite links that leave docs/."""
    roots = {name: path for path, name in ADDED.items()}
    source = roots.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    extra = config.extra
    return rewritten(markdown, source, extra.get("repository"), extra.get("branch", "main"), titles_of(config.nav))


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Collect external links."""
    for link in _TARGET.findall(html):
        _external[link].add(page.file.src_uri)
    return html


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Warn of what a page loads from other servers."""
    for address in loaded_from_elsewhere(output):
        _log.warning("%s loads %s: the site must work without a network", page.file.src_uri, address)
    return output


def on_post_build(config: Any) -> None:
    """Write the list of external links."""
    (Path(config.site_dir) / EXTERNAL_LINKS).write_text(listed(_external), encoding="utf-8")
