"""The terminal's side of a chat: reads lines, carries out commands, shows answers token by token, stops them on Ctrl-C.

Everything here happens on the first process. What all processes must compute (an answer, a second model) it asks for by
yielding an order, and receives the result: `generate.py` carries out the orders.
"""

from __future__ import annotations

import copy
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from megarl.chat.commands import (
    Command,
    changed,
    completions,
    help_lines,
    key_and_value,
    parse,
    settable_keys,
    split_line_number,
)
from megarl.chat.conversation import Conversation, load, save
from megarl.command import printable, say
from megarl.errors import DataError, MegarlError
from megarl.tokenizers.streaming import StreamedText

if TYPE_CHECKING:
    from megarl.chat.templates import Message
    from megarl.config.sections.rollout import ResponsesConfig
    from megarl.tokenizers import Tokenizer

GREETING = "Type a message; /help lists the commands, Ctrl-C stops an answer, /quit or Ctrl-D ends the chat."
_PATIENCE = 3
"""Number of Ctrl-C during one answer after which the chat ends, as a model that does not reach its next token cannot
stop."""


@dataclass(frozen=True)
class Answer:
    """An order: sample an answer. The result is its text, or an error."""

    speaker: int
    tokens: tuple[int, ...]
    settings: ResponsesConfig
    max_new_tokens: int
    turn: int


@dataclass(frozen=True)
class Open:
    """An order: open a second model. The result is its `Speaker`, or an error."""

    path: str


@dataclass(frozen=True)
class Close:
    """An order: close the second model."""


Order = Answer | Open | Close


@dataclass
class Speaker:
    """A model that answers, as the terminal knows it.

    Attributes:
        name: what the model is called: its path.
        tokenizer: its tokenizer.
        context: maximum number of tokens of a prompt and its answer.
        stops: tokens that end an answer and are not shown.
        template: the chat template; None: the tokenizer's.
        plain: continue the text of the conversation, without a template. None: only without a usable template.
        conversation: what was said so far.
    """

    name: str
    tokenizer: Tokenizer
    context: int
    stops: tuple[int, ...] = ()
    template: str | None = None
    plain: bool | None = None
    conversation: Conversation = field(default_factory=Conversation)

    def __post_init__(self) -> None:
        if self.plain is None:
            self.plain = self.tokenizer.template_in_use(self.template) is None and not self._writes_markers()

    def _writes_markers(self) -> bool:
        """Return whether the tokenizer can encode the built-in template."""
        try:
            self.tokenizer.encode_chat_prompt([])
        except DataError:
            return False
        return True

    def encode(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a conversation that is to be answered."""
        if not self.plain:
            return self.tokenizer.encode_chat_prompt(messages, self.template)
        texts = [str(message.get("content") or "") for message in messages]
        try:
            return self.tokenizer.encode_prompt("\n".join(texts))
        except DataError:
            if len(texts) == 1:
                raise
            return self.tokenizer.encode_prompt("".join(texts))  # an alphabet without the line feed


class TerminalChat:
    """A chat with one model, or with two side by side."""

    def __init__(self, speaker: Speaker, settings: ResponsesConfig) -> None:
        self.speakers = [speaker]
        self.settings = settings
        self.turn = 0
        self.stopped = False
        self._told_left_out = False
        self._stream: StreamedText | None = None
        self._speaking = speaker

    # --- the conversation, as orders ----------------------------------------------------------------------------------

    def orders(self) -> Generator[Order, Any, None]:
        """Read lines until the end of the input or /quit. Yield what must be computed, and take its result."""
        _tell(GREETING)
        if self._speaking.plain:
            _tell("(this model has no chat template: it continues the text of the conversation)")
        with _line_editing():
            while (line := _read_line()) is not None:
                before = [(one, copy.deepcopy(one.conversation)) for one in self.speakers]
                try:
                    command = parse(line)
                    if command.name == "quit":
                        return
                    if command.name or command.rest:
                        yield from self._carry_out(command)
                except MegarlError as error:
                    for speaker, conversation in before:
                        speaker.conversation = conversation
                    say(f"error: {error}")

    def _carry_out(self, command: Command) -> Generator[Order, Any, None]:
        name, rest = command.name, command.rest
        if not name:
            yield from self._ask(rest)
        elif name == "retry":
            text = self._take_back()
            yield from self._ask(text)
        elif name == "compare":
            yield from self._compare(rest)
        elif name == "undo":
            _tell(f"(taken back: {self._take_back()[:60]!r})")
        elif name == "set":
            self.settings = changed(self.settings, rest)
            key, _ = key_and_value(rest)
            _tell(f"({key}={getattr(self.settings, key)})")
        elif name == "save":
            target = save(rest, [(one.name, one.conversation) for one in self._that_spoke()])
            _tell(f"(saved to {target})")
        else:
            {"show": self._show, "help": self._help, "reset": self._reset}.get(name, lambda: self._change(name, rest))()

    def _change(self, name: str, rest: str) -> None:
        """Carry out /system and /load, for every model."""
        if name == "system":
            for speaker in self.speakers:
                speaker.conversation.system = rest or None
            _tell("(the system message is set)" if rest else "(there is no system message)")
            return
        loaded = load(*split_line_number(rest))
        for speaker in self.speakers:
            speaker.conversation = Conversation(loaded.system, list(loaded.turns))
        self._told_left_out = False
        unanswered = bool(loaded.turns) and loaded.turns[-1]["role"] == "user"
        _tell(f"({len(loaded.turns)} messages" + ("; /retry answers the last one)" if unanswered else ")"))

    def _ask(self, text: str) -> Generator[Order, Any, None]:
        """Let every model answer a message."""
        self.turn += 1
        for number, speaker in enumerate(self.speakers):
            self._speaking = speaker
            speaker.conversation.say("user", text)
            tokens, longest = self._fit(speaker)
            if len(self.speakers) > 1:
                self._write(f"--- {speaker.name}\n")
            self._stream = StreamedText(speaker.tokenizer.decode)
            result = yield Answer(number, tuple(tokens), self.settings, longest, self.turn)
            if isinstance(result, MegarlError):
                self._write("\n")
                raise result
            speaker.conversation.say("assistant", result)
            if self.stopped:
                _tell("(stopped)")

    def _fit(self, speaker: Speaker) -> tuple[list[int], int]:
        """Return the prompt's tokens, and how long the answer may be: at most half of the context."""
        longest = min(self.settings.max_new_tokens, max(1, speaker.context // 2))
        fitted = speaker.conversation.fit(speaker.encode, max(1, speaker.context - longest))
        if not fitted.tokens:
            raise DataError("the message has no tokens, so there is nothing to answer: write more", key="message")
        if fitted.cut:
            _tell(
                f"(the model reads the last {len(fitted.tokens)} of this message's {len(fitted.tokens) + fitted.cut} "
                "tokens)"
            )
        if fitted.left_out and not self._told_left_out:
            self._told_left_out = True
            _tell(
                f"(the model's context of {speaker.context} tokens is full: from now on the oldest messages are left "
                "out; /reset begins anew)"
            )
        return fitted.tokens, longest

    def _take_back(self) -> str:
        texts = [speaker.conversation.undo() for speaker in self.speakers]
        text = next((one for one in texts if one is not None), None)
        if text is None:
            raise DataError("there is no message to take back: the conversation is empty", key="/undo")
        return text

    def _that_spoke(self) -> list[Speaker]:
        if not self.speakers[0].conversation.turns:
            raise DataError("there is nothing to save: the conversation is empty", key="/save")
        return [one for one in self.speakers if one.conversation.turns]

    def _compare(self, path: str) -> Generator[Order, Any, None]:
        """Open a second model, which takes over what was said; `off` closes it."""
        if len(self.speakers) > 1:
            del self.speakers[1:]
            yield Close()
            _tell(f"({self.speakers[0].name} answers alone)")
        elif path == "off":
            raise DataError("no second model answers: /compare MODEL opens one", key="/compare", value=path)
        if path == "off":
            return
        result = yield Open(path)
        if isinstance(result, MegarlError):
            raise result
        first = self.speakers[0].conversation
        result.conversation = Conversation(first.system, list(first.turns))
        self.speakers.append(result)
        _tell(f"({result.name} answers too; /compare off ends that)")

    # --- what is told -------------------------------------------------------------------------------------------------

    def _help(self) -> None:
        for line in help_lines():
            _tell(line)

    def _reset(self) -> None:
        for speaker in self.speakers:
            speaker.conversation.reset()
        self._told_left_out = False
        _tell("(the conversation is forgotten)")

    def _show(self) -> None:
        for speaker in self.speakers:
            talk = speaker.conversation
            how = "no template" if speaker.plain else "the chat template"
            tokens = len(speaker.encode(talk.messages)) if talk.messages else 0
            _tell(f"{speaker.name}: {len(talk.turns)} messages, {tokens} of {speaker.context} tokens, {how}")
        if (system := self.speakers[0].conversation.system) is not None:
            _tell(f"system={system}")
        _tell(" ".join(f"{key}={getattr(self.settings, key)}" for key in settable_keys()))

    # --- an answer while it is sampled --------------------------------------------------------------------------------

    def take(self, token: int) -> None:
        """Show one more token of the answer."""
        if self._stream is not None and token not in self._speaking.stops:
            self._write(printable(self._stream.add(token)))

    def finish(self, tokens: Sequence[int], *, stopped: bool) -> str:
        """Show the end of the answer. Return its whole text.

        Args:
            tokens: all tokens of the answer, without EOS.
            stopped: whether Ctrl-C stopped it.
        """
        assert self._stream is not None
        self.stopped = stopped
        self._write(printable(self._stream.end()) + "\n")
        return self._speaking.tokenizer.decode(tokens)

    def _write(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


@contextmanager
def interrupts(*, ignored: bool) -> Iterator[Callable[[], bool]]:
    """Within the block, count Ctrl-C instead of ending. Yield a function that tells whether there was one.

    Args:
        ignored: whether this process leaves Ctrl-C to the first process.
    """
    count = 0

    def on_interrupt(*_: object) -> None:
        nonlocal count
        count += 1
        if count >= _PATIENCE and not ignored:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _tell(line: str) -> None:
    """Print a line that is not an answer."""
    sys.stderr.write(printable(line) + "\n")
    sys.stderr.flush()


def _on_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty()


def _read_line() -> str | None:
    """Return the next line, None at the end of the input. On a terminal, Ctrl-C drops the line that is being typed."""
    while True:
        try:
            if _on_terminal():
                return input("> ")
            if sys.stdin.isatty():
                sys.stderr.write("> ")
                sys.stderr.flush()
            line = sys.stdin.readline()
            return line.rstrip("\n") if line else None
        except EOFError:
            sys.stderr.write("\n")
            return None
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                raise
            _tell("\n(/quit or Ctrl-D ends the chat)")


@contextmanager
def _line_editing() -> Iterator[None]:
    """Give a terminal's lines editing, a history and completion of commands, where Python has readline. Characters that
    are not valid in the input are replaced."""
    with suppress(AttributeError, ValueError):  # an input that is no text stream of its own
        sys.stdin.reconfigure(errors="replace")  # type: ignore[union-attr]
    readline: Any = None
    if _on_terminal():
        with suppress(ImportError):
            import readline
    if readline is None:
        yield
        return
    before = readline.get_completer(), readline.get_completer_delims()

    def complete(text: str, state: int) -> str | None:
        found = completions(text, readline.get_line_buffer())
        return found[state] if state < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")
    try:
        yield
    finally:
        readline.set_completer(before[0])
        readline.set_completer_delims(before[1])
