"""The commands of a chat: what a line asks for, and refusals that say what to type."""

from typing import Any

import pytest

from megarl.chat.commands import COMMANDS, Command, changed, completions, help_lines, parse, split_line_number
from megarl.config.sections.rollout import ResponsesConfig
from megarl.errors import ConfigError
from tests.refusals import refused


@pytest.mark.parametrize(
    ("line", "command"),
    [
        (" hello /quit ", Command("", "hello /quit")),
        ("", Command("", "")),
        ("/quit", Command("quit")),
        ("/SYSTEM  Be brief. ", Command("system", "Be brief.")),
        ("/system", Command("system", "")),
        ("//etc is a folder", Command("", "/etc is a folder")),
        ("/save my chat.jsonl", Command("save", "my chat.jsonl")),
    ],
)
def test_a_line_is_a_message_or_a_command(line: str, command: Command) -> None:
    assert parse(line) == command


@pytest.mark.parametrize(
    ("line", "key", "offer"),
    [
        ("/sav a", "/sav", "/save"),
        ("/exit", "/exit", "/quit"),
        ("/temperature 0.2", "/temperature", "/set temperature"),
        ("/save", "/save", "chat.jsonl"),
        ("/set", "/set", "temperature 0.2"),
    ],
)
def test_a_wrong_command_is_answered_with_what_to_type(line: str, key: str, offer: str) -> None:
    with refused(ConfigError, key=key, offers={key: [offer]}):
        parse(line)


@pytest.mark.parametrize("line", ["/undo 2", "/zzzzz", "/", "/ ", "/\x00\x1b[31m"])
def test_other_wrong_commands_are_one_line(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(line)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("rest", "key", "value"),
    [
        ("temperature 0.2", "temperature", 0.2),
        ("temperature=1e-1", "temperature", 0.1),
        ("rollout.top_k = 5", "top_k", 5),
        ("top_p null", "top_p", None),
        ("max_new_tokens 7", "max_new_tokens", 7),
        ("stop User:", "stop", ["User:"]),
        ('stop ["\\n", "a=b"]', "stop", ["\n", "a=b"]),
        ("stop []", "stop", []),
        ("stop a=b", "stop", ["a=b"]),
    ],
)
def test_set_changes_one_key(rest: str, key: str, value: Any) -> None:
    before = ResponsesConfig(top_p=0.5)
    after = changed(before, rest)
    assert getattr(after, key) == value
    assert type(getattr(after, key)) is type(value)
    assert before == ResponsesConfig(top_p=0.5)


@pytest.mark.parametrize(
    ("rest", "key"),
    [
        ("temperature hot", "temperature"),
        ("temperature -1", "temperature"),
        ("temperature nan", "temperature"),
        ("temperature 0.001", "temperature"),
        ("top_k 2.5", "top_k"),
        ("top_p 1.5", "top_p"),
        ("max_new_tokens 0", "max_new_tokens"),
        ("max_new_tokens null", "max_new_tokens"),
        ("temperature", "temperature"),
        ('stop [""]', "stop"),
        ("stop [", "stop"),
    ],
)
def test_set_refuses_values_that_the_key_does_not_take(rest: str, key: str) -> None:
    with refused(ConfigError, key=key):
        changed(ResponsesConfig(), rest)


def test_set_offers_the_nearest_key() -> None:
    with refused(ConfigError, key="temprature", offers={"temprature": ["temperature"]}):
        changed(ResponsesConfig(), "temprature 0.2")


def test_help_has_every_command_and_key() -> None:
    told = "\n".join(help_lines())
    assert all(f"/{name}" in told for name in COMMANDS)
    assert "repetition_penalty" in told


def test_load_takes_the_number_of_a_line() -> None:
    assert split_line_number("my chat.jsonl 3") == ("my chat.jsonl", 3)
    assert split_line_number("my chat.jsonl") == ("my chat.jsonl", 1)
    assert split_line_number("3") == ("3", 1)


def test_tab_completes_commands_and_keys() -> None:
    assert completions("/sa", "/sa") == ["/save "]
    assert completions("temp", "/set temp") == ["temperature "]
    assert completions("sa", "sa") == []
