"""HTML as a tree, parsed strictly: what is opened is closed, in order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset(("meta", "link", "input", "br", "hr", "img"))


@dataclass
class Element:
    """An element with its attributes, and with the texts and elements inside it."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    content: list[Element | str] = field(default_factory=list)

    @property
    def children(self) -> list[Element]:
        """The elements inside, without what is inside those."""
        return [each for each in self.content if isinstance(each, Element)]

    def all(self, tag: str = "", **wanted: str) -> list[Element]:
        """Return the elements inside with a tag, and with values of attributes."""
        return [
            each
            for each in self._inside()
            if tag in ("", each.tag) and all(each.attributes.get(name) == value for name, value in wanted.items())
        ]

    def with_class(self, name: str) -> list[Element]:
        """Return the elements inside that have a class."""
        return [each for each in self._inside() if name in (each.attributes.get("class") or "").split()]

    def text(self) -> str:
        """Return the text of the element and of those inside."""
        return "".join(each if isinstance(each, str) else each.text() for each in self.content)

    def _inside(self) -> Iterator[Element]:
        for child in self.children:
            yield child
            yield from child._inside()


class _Parser(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("")
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"an attribute of {tag} is there twice: {names}"
        element = Element(tag, dict(attrs))
        self.open[-1].content.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].content.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open[-1].tag == tag, f"</{tag}> closes {self.open[-1].tag} at {self.getpos()}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        self.open[-1].content.append(data)


def parse(text: str) -> Element:
    """Return the tree of a page; fail if it is not balanced."""
    parser = _Parser()
    parser.feed(text)
    parser.close()
    assert [element.tag for element in parser.open] == [""], "something is not closed"
    return parser.root
