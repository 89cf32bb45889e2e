"""A conversation that grows: its turns, what of it fits a model's context, and the file it is kept in."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megarl.chat.templates import Message, check_messages
from megarl.disk import UnreadableError, local, parse_object, read_text, require_new, shown, writable
from megarl.errors import DataError, MegarlError

Encode = Callable[[Sequence[Message]], list[int]]


@dataclass
class Fitted:
    """The tokens of a conversation that a model reads.

    Attributes:
        tokens: the prompt.
        left_out: number of oldest messages that are not in it.
        cut: number of tokens that the rest lost at its beginning, as a single turn was too long.
    """

    tokens: list[int]
    left_out: int = 0
    cut: int = 0


@dataclass
class Conversation:
    """Turns of a user and a model, after an optional system message."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)
    left_out: int = 0
    """Number of oldest turns that no longer fitted the last prompt."""

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, and all turns."""
        return self._with_system(self.turns)

    def say(self, role: str, content: str) -> None:
        """Append a turn."""
        self.turns.append({"role": role, "content": content})

    def reset(self) -> None:
        """Forget all turns."""
        self.turns.clear()
        self.left_out = 0

    def undo(self) -> str | None:
        """Remove the user's last message and all that follows it. Return its text, None if there is none."""
        last = next((at for at in reversed(range(len(self.turns))) if self.turns[at]["role"] == "user"), None)
        if last is None:
            return None
        text = str(self.turns[last].get("content") or "")
        del self.turns[last:]
        self.left_out = 0
        return text

    def fit(self, encode: Encode, longest: int) -> Fitted:
        """Return the tokens of the newest turns that fit.

        The system message stays, and so does the last message of the user. If these alone are too long, their first
        tokens are cut off.

        Args:
            encode: returns the tokens of messages, as a prompt.
            longest: maximum number of tokens.
        """
        while True:
            tokens = encode(self._with_system(self.turns[self.left_out :]))
            following = self._next_question()
            if len(tokens) <= longest or following is None:
                return Fitted(tokens[-longest:], self.left_out, max(0, len(tokens) - longest))
            self.left_out = following

    def _next_question(self) -> int | None:
        """Return the index of the user's second message among those that are not left out."""
        users = [at for at in range(self.left_out, len(self.turns)) if self.turns[at]["role"] == "user"]
        later = [at for at in users if at > self.left_out]
        return later[0] if later else None

    def _with_system(self, turns: Sequence[Message]) -> list[Message]:
        return [*([] if self.system is None else [{"role": "system", "content": self.system}]), *turns]


def save(path: str, conversations: Sequence[tuple[str, Conversation]]) -> Path:
    """Write conversations, each with the name of its model, to a new file: a JSON object per line, with the turns under
    `messages`, which training reads as it is. Return the file."""
    require_new(path, "/save FILE")
    target = writable(path, "/save FILE")
    lines = [json.dumps({"messages": one.messages, "model": name}, ensure_ascii=False) for name, one in conversations]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8", errors="replace") as file:
            file.write("".join(f"{line}\n" for line in lines))
    except OSError as problem:
        raise DataError(
            f"/save {shown(path)}: cannot be written ({problem.strerror or problem}); name another file",
            key="/save",
            value=path,
        ) from None
    return target


def load(path: str, number: int = 1) -> Conversation:
    """Return the conversation in a line of a file that `save`, or anyone, has written. Lines count from 1."""
    where = f"{shown(path)}:{number}"
    try:
        lines = [line for line in read_text(local(path)).split("\n") if line.strip()]
        if not 1 <= number <= len(lines):
            raise DataError(f"{where} is not there: the file has {len(lines)} conversations", where=where)
        messages = parse_object(lines[number - 1]).get("messages")
        if not messages:
            raise DataError(f"{where} has no conversation: messages is missing or empty", key="messages", where=where)
        check_messages(messages)
    except UnreadableError as problem:
        raise DataError(
            f"/load {shown(path)}: {problem}; give a file that /save wrote, with one conversation per line", where=where
        ) from None
    except MegarlError as problem:
        raise problem if problem.where == where else problem.within(where) from None
    system = str(messages[0]["content"]) if messages[0]["role"] == "system" else None
    return Conversation(system, list(messages if system is None else messages[1:]))
