"""Mutators: each takes a random generator and something well-formed, and returns a label and something malformed."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import Any

Path = tuple[Any, ...]
"""Keys and indices that lead from the root of a JSON tree to a node."""


class Raw(str):
    """Text that `dumps` writes as it is, for JSON that Python's writer refuses or that is not JSON."""


DEEP = Raw("[" * 100_000 + "]" * 100_000)
LONG_INTEGER = Raw("1" * 5_000)

VALUES: list[tuple[str, Any]] = [
    ("null", None),
    ("true", True),
    ("false", False),
    ("0", 0),
    ("1", 1),
    ("-1", -1),
    ("3", 3),
    ("7", 7),
    ("2.5", 2.5),
    ("1e30", 1e30),
    ("-1e308", -1e308),
    ("2**31", 2**31),
    ("2**63", 2**63),
    ("10**20", 10**20),
    ("10**400", 10**400),
    ("NaN", float("nan")),
    ("Infinity", float("inf")),
    ("an empty text", ""),
    ("a word", "two"),
    ("digits", "12"),
    ("a newline", "one\ntwo"),
    ("a NUL", "a\0b"),
    ("an escape", "\x1b[31mred"),
    ("half a character", "\ud800"),
    ("a path upwards", "../../outside"),
    ("an absolute path", "/etc/hostname"),
    ("a long text", "x" * 70_000),
    ("a long name", "y" * 300),
    ("an empty list", []),
    ("a list", [1, "two", None]),
    ("an empty object", {}),
    ("an object", {"key": {"key": 1}}),
    ("nested too deep", DEEP),
    ("a long integer", LONG_INTEGER),
    ("no JSON", Raw("{'a': }")),
]
"""Labelled values for any place in a tree."""


def dumps(tree: Any, **options: Any) -> str:
    """JSON in which `Raw` nodes stand as they are."""
    raw: list[Raw] = []

    def marked(node: Any) -> Any:
        if isinstance(node, Raw):
            raw.append(node)
            return f"@raw {len(raw) - 1}@"
        if isinstance(node, dict):
            return {key: marked(value) for key, value in node.items()}
        return [marked(value) for value in node] if isinstance(node, list) else node

    text = json.dumps(marked(tree), **options)
    for number, node in enumerate(raw):
        text = text.replace(f'"@raw {number}@"', node)
    return text


def nodes(tree: Any, path: Path = ()) -> Iterator[Path]:
    """The paths of all nodes below the root."""
    entries = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in entries:
        yield (*path, key)
        yield from nodes(value, (*path, key))


def tree(draw: Random, whole: Any, values: Sequence[tuple[str, Any]] = VALUES) -> tuple[str, Any]:
    """One node of a JSON tree is replaced, removed, renamed, doubled or joined by a new one."""
    label, value = draw.choice(values)
    value = copy.deepcopy(value)
    places = list(nodes(whole))
    if not places or draw.random() < 0.04:
        return f"the whole becomes {label}", value
    path = draw.choice(places)
    changed = copy.deepcopy(whole)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    last, name = path[-1], ".".join(map(str, path))
    how = draw.choices(("replace", "remove", "rename", "add", "wrap"), (12, 3, 1, 1, 2))[0]
    if how == "replace":
        parent[last] = value
        return f"{name} becomes {label}", changed
    if how == "remove":
        del parent[last]
        return f"{name} is removed", changed
    if how == "rename" and isinstance(parent, dict):
        parent[f"{last}_2"] = parent.pop(last)
        return f"{name} is renamed", changed
    if how == "add" and isinstance(parent, dict):
        parent["key_of_a_later_version"] = value
        return f"beside {name} a key of {label}", changed
    parent[last] = [parent[last]]
    return f"{name} is put into a list", changed


def data(draw: Random, content: bytes) -> tuple[str, bytes]:
    """Bytes that are cut, flipped, overwritten, doubled, emptied, padded or exchanged."""
    content = content or b"\0"
    size = len(content)
    at = draw.randrange(size)
    span = draw.choice((1, 2, 8, 64, 512))
    kind = draw.randrange(9)
    if kind == 0:
        return f"cut after byte {at}", content[:at]
    if kind == 1:
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 4, 32))):
            changed[draw.randrange(size)] ^= 1 << draw.randrange(8)
        return "some bits flipped", bytes(changed)
    if kind == 2:
        return "emptied", b""
    if kind == 3:
        return f"{span} bytes of zeros at {at}", content[:at] + bytes(span) + content[at + span :]
    if kind == 4:
        return f"{span} random bytes at {at}", content[:at] + draw.randbytes(span) + content[at + span :]
    if kind == 5:
        return f"{span} bytes left out at {at}", content[:at] + content[at + span :]
    if kind == 6:
        return f"{span} bytes put in at {at}", content[:at] + draw.randbytes(span) + content[at:]
    if kind == 7:
        return "twice", content + content
    return "random", draw.randbytes(draw.choice((1, 7, 8, 100, 5_000)))


def text(draw: Random, content: str) -> tuple[str, bytes]:
    """Text whose encoding, line ends or characters are spoilt."""
    at = draw.randrange(max(len(content), 1))
    strange = draw.choice(
        ("\0", "\x1b[2J", "\ufeff", "\u2028", "\u202e", "\r", "\n", "\t", "é", "\U0001f600", '"', "\\")
    )
    ways: list[tuple[str, Callable[[], bytes]]] = [
        ("in UTF-16", lambda: content.encode("utf-16")),
        ("in Latin-1 with an accent", lambda: (content[:at] + "é" + content[at:]).encode("latin-1", "replace")),
        ("with a byte order mark", lambda: b"\xef\xbb\xbf" + content.encode()),
        ("with CRLF", lambda: content.replace("\n", "\r\n").encode()),
        ("with CR alone", lambda: content.replace("\n", "\r").encode()),
        (f"with {strange!r} at {at}", lambda: (content[:at] + strange + content[at:]).encode()),
        ("without line ends", lambda: content.replace("\n", "").encode()),
        ("blank", lambda: b"\n \n\t\n"),
        ("with a cut character at the end", lambda: content.encode() + "é".encode()[:1]),
        ("with half of a surrogate pair", lambda: content.encode() + b"\xed\xa0\x80"),
        ("cut", lambda: content.encode()[:at]),
    ]
    label, way = draw.choice(ways)
    return label, way()


def put(path: Any, content: bytes | str | None) -> None:
    """Write a file; None removes it."""
    if content is None:
        path.unlink(missing_ok=True)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_bytes(content.encode("utf-8", "surrogatepass"))


# --- tar --------------------------------------------------------------------------------------------------------------

Members = list[tuple[tarfile.TarInfo, bytes]]


def unpacked(content: bytes) -> Members:
    """Members of a tar and their content."""
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        found = []
        for member in tar.getmembers():
            file = tar.extractfile(member)
            found.append((member, file.read() if file else b""))
        return found


def packed(members: Members) -> bytes:
    """A tar of members; sizes are those of their content unless they are no plain files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:") as tar:
        for member, content in members:
            if member.isreg():
                member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def plain_member(name: str, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    return tarfile.TarInfo(name), content


def members(draw: Random, whole: Members) -> tuple[str, Members]:
    """Members that are removed, renamed, doubled, emptied, made links, devices or folders, joined by hostile ones."""
    changed = [(copy.copy(member), content) for member, content in whole]
    at = draw.randrange(len(changed))
    member, content = changed[at]
    name = member.name
    kind = draw.randrange(12)
    if kind == 0:
        del changed[at]
        return f"{name} is missing", changed
    if kind == 1:
        member.name = draw.choice(("../../outside", "/tmp/megarl-fuzz-outside", "a/../../b", "x" * 300, "é\n", "", "."))
        return f"{name} is called {member.name[:20]!r}", changed
    if kind == 2:
        changed.append((copy.copy(member), draw.choice((b"", content[: len(content) // 2], b"other"))))
        return f"{name} comes twice", changed
    if kind in (3, 4):
        member.type = draw.choice((tarfile.SYMTYPE, tarfile.LNKTYPE))
        member.linkname = draw.choice(("/etc/passwd", "../../../etc/passwd", name, "gone", ""))
        return f"{name} is a link to {member.linkname!r}", changed
    if kind == 5:
        member.type = draw.choice((tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, b"Z"))
        return f"{name} is of type {member.type!r}", changed
    if kind == 6:
        changed.insert(0, plain_member(draw.choice(("../../outside", "/tmp/megarl-fuzz-outside")), b"hostile"))
        return f"a member {changed[0][0].name}", changed
    if kind == 7:
        link = tarfile.TarInfo("tokenizer")
        link.type, link.linkname = tarfile.SYMTYPE, "/tmp"
        changed.insert(0, (link, b""))
        changed.append(plain_member("tokenizer/megarl-fuzz-outside", b"hostile"))
        return "a member under a link to /tmp", changed
    if kind == 8:
        draw.shuffle(changed)
        return "members in another order", changed
    if kind == 9:
        member.mode, member.mtime, member.uid = 0, 2**33, 2**21
        return f"{name} with odd numbers", changed
    spoil, content = data(draw, content)
    changed[at] = (member, content)
    return f"{name} {spoil}", changed
