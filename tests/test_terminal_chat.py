"""The terminal's side of a chat: commands and what they change, and the whole program on a terminal."""

import io
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from megarl.config.sections.rollout import ResponsesConfig
from megarl.errors import ConfigError, MegarlError
from megarl.terminal_chat import Answer, Close, Open, Order, Speaker, TerminalChat
from megarl.tokenizers import ByteTokenizer, Tokenizer, build_tokenizer
from tests.terminals import Terminal

Reply = Callable[[Answer], "str | MegarlError"]


class Talk:
    """A chat that was driven without a model, and what it printed."""

    def __init__(self, chat: TerminalChat, orders: list[Order], out: str, err: str) -> None:
        self.chat, self.orders, self.out, self.err = chat, orders, out, err

    def said(self, speaker: int = 0) -> list[str]:
        return [str(turn["content"]) for turn in self.chat.speakers[speaker].conversation.turns]

    @property
    def asked(self) -> list[Answer]:
        return [order for order in self.orders if isinstance(order, Answer)]


def prompt_text(order: Answer) -> str:
    return ByteTokenizer().decode(order.tokens)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Talk]:
    """Drives a chat with lines of input. Answers are numbered unless `reply` makes them."""

    def drive(
        *lines: str,
        reply: Reply | None = None,
        tokenizer: Tokenizer | None = None,
        context: int = 200,
        stopped: Sequence[int] = (),
        **settings: Any,
    ) -> Talk:
        out, err = io.StringIO(), io.StringIO()
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        monkeypatch.setattr(sys, "stdout", out)
        monkeypatch.setattr(sys, "stderr", err)
        tokenizer = tokenizer or ByteTokenizer()
        speaker = Speaker("one", tokenizer, context, (tokenizer.eos_id,))
        chat = TerminalChat(speaker, ResponsesConfig(**{"max_new_tokens": 20, **settings}))
        steps, result, orders = chat.orders(), None, []
        while (order := next_order(steps, result)) is not None:
            orders.append(order)
            if isinstance(order, Open):
                found = order.path != "missing"
                result = Speaker(order.path, tokenizer, context) if found else ConfigError("/compare: no such model")
            elif isinstance(order, Answer):
                number = sum(isinstance(one, Answer) for one in orders)
                text = f"answer {number}" if reply is None else reply(order)
                result = text if isinstance(text, MegarlError) else finished(chat, tokenizer, text, number in stopped)
            else:
                result = None
        return Talk(chat, orders, out.getvalue(), err.getvalue())

    return drive


def next_order(steps: Any, result: Any) -> Order | None:
    try:
        return steps.send(result)
    except StopIteration:
        return None


def finished(chat: TerminalChat, tokenizer: Tokenizer, text: str, stopped: bool) -> str:
    tokens = tokenizer.encode(text)
    for token in [*tokens, tokenizer.eos_id]:
        chat.take(token)
    return chat.finish(tokens, stopped=stopped)


def test_answers_stand_in_the_next_prompt_and_on_standard_output_alone(talk: Callable[..., Talk]) -> None:
    done = talk("hello", "", "and then?")
    assert done.out == "answer 1\nanswer 2\n"
    assert prompt_text(done.asked[1]) == "helloanswer 1and then?"
    assert done.said() == ["hello", "answer 1", "and then?", "answer 2"]


def test_undo_retry_reset_and_system_change_the_next_prompt(talk: Callable[..., Talk]) -> None:
    done = talk("a", "b", "/retry", "/undo", "c", "/reset", "/system S", "d", "/system", "e")
    prompts = [prompt_text(order) for order in done.asked]
    assert prompts == ["a", "aanswer 1b", "aanswer 1b", "aanswer 1c", "Sd", "danswer 5e"]
    assert len({order.turn for order in done.asked}) == len(prompts)  # a retry has other random numbers


def test_settings_hold_from_the_next_answer_on(talk: Callable[..., Talk]) -> None:
    done = talk("a", "/set temperature 0.2", "/set top_k=3", "b", "/show")
    assert [(one.settings.temperature, one.settings.top_k) for one in done.asked] == [(1.0, None), (0.2, 3)]
    assert "temperature=0.2" in done.err.splitlines()[-1]


@pytest.mark.parametrize(
    "line",
    ["/set temperature hot", "/sett", "/undo", "/retry", "/save", "/load missing.jsonl", "/compare off",
     "/save x.jsonl", "/compare missing", "/set"],
)  # fmt: skip
def test_what_cannot_be_done_is_one_line_and_changes_nothing(line: str, talk: Callable[..., Talk]) -> None:
    done = talk(line, "a")
    assert [told for told in done.err.splitlines() if told.startswith("error: ")] == done.err.splitlines()[1:]
    assert len(done.err.splitlines()) == 2
    assert done.said() == ["a", "answer 1"]


def test_an_answer_that_fails_leaves_the_conversation_as_it_was(talk: Callable[..., Talk]) -> None:
    answers: Iterator[str | MegarlError] = iter(["fine", ConfigError("the scores are NaN"), "better"])
    done = talk("a", "/retry", "b", reply=lambda order: next(answers))
    assert "error: the scores are NaN" in done.err
    assert done.said() == ["a", "fine", "b", "better"]


def test_two_models_answer_one_after_the_other_from_their_own_answers(talk: Callable[..., Talk]) -> None:
    done = talk("a", "/compare two", "b", "c", "/compare off", "d")
    assert done.out.startswith("answer 1\n--- one\nanswer 2\n--- two\nanswer 3\n--- one\n")
    prompts = [prompt_text(order) for order in done.asked]
    assert prompts[1:3] == ["aanswer 1b"] * 2
    assert prompts[3:5] == ["aanswer 1banswer 2c", "aanswer 1banswer 3c"]
    assert [type(order) for order in done.orders[-2:]] == [Close, Answer]
    assert done.said() == ["a", "answer 1", "b", "answer 2", "c", "answer 4", "d", "answer 6"]


def test_both_conversations_are_saved_and_loaded(talk: Callable[..., Talk], tmp_path: Path) -> None:
    file = tmp_path / "chat.jsonl"
    first = talk("/compare two", "a", f"/save {file}", f"/save {file}")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["model"], line["messages"][-1]["content"]) for line in lines] == [
        ("one", "answer 1"),
        ("two", "answer 2"),
    ]
    assert "error: /save FILE=" in first.err
    again = talk(f"/load {file} 2", "b")
    assert prompt_text(again.asked[0]) == "aanswer 2b"


def test_a_full_context_is_told_of_once(talk: Callable[..., Talk]) -> None:
    done = talk(*["x" * 20] * 6, context=100)
    assert done.err.count("left out") == 1
    assert all(len(order.tokens) + order.max_new_tokens <= 100 for order in done.asked)
    assert len(done.said()) == 12


def test_a_stopped_answer_is_kept(talk: Callable[..., Talk]) -> None:
    done = talk("a", "b", stopped=[1])
    assert done.said() == ["a", "answer 1", "b", "answer 2"]
    assert "(stopped)" in done.err


def test_control_characters_of_a_model_do_not_reach_the_terminal(talk: Callable[..., Talk]) -> None:
    done = talk("a", reply=lambda order: "\x1b[2Jhi")
    assert done.out == "\\x1b[2Jhi\n"


def test_a_tokenizer_without_markers_continues_the_text(talk: Callable[..., Talk]) -> None:
    letters = build_tokenizer("characters", "abc")
    done = talk("ab", "xyz", "c", reply=lambda order: "a", tokenizer=letters)
    assert [letters.decode(order.tokens) for order in done.asked] == ["ab", "abac"]
    assert "'x'" in done.err  # a message that it cannot encode is refused, and the chat goes on


# --- the whole program ------------------------------------------------------------------------------------------------


POSITIONS = 32768


@pytest.fixture
def stored_model(tmp_path: Path) -> Path:
    """A GPT-2 that says random small letters and never ends; transformers would take long to import."""
    draw, width = torch.Generator().manual_seed(0), 32
    shapes = {
        "wte.weight": (262, width),
        "wpe.weight": (POSITIONS, width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for name, rows, columns in (
        ("attn.c_attn", width, 3 * width),
        ("attn.c_proj", width, width),
        ("mlp.c_fc", width, 4 * width),
        ("mlp.c_proj", 4 * width, width),
    ):
        shapes |= {f"h.0.{name}.weight": (rows, columns), f"h.0.{name}.bias": (columns,)}
    for name in ("ln_1", "ln_2"):
        shapes |= {f"h.0.{name}.weight": (width,), f"h.0.{name}.bias": (width,)}
    folder = tmp_path / "model"
    folder.mkdir()
    tensors = {
        f"transformer.{name}": torch.ones(shape) if "ln" in name else torch.randn(shape, generator=draw) * 0.02
        for name, shape in shapes.items()
    }
    # The final bias pushes all tokens far down whose embedding points against it: all but the letters.
    tensors["transformer.ln_f.bias"] = torch.ones(width)
    tensors["transformer.wte.weight"][: ord("a")] = -1.0
    tensors["transformer.wte.weight"][ord("z") + 1 :] = -1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 262, "n_embd": width, "n_layer": 1,
        "n_head": 2, "n_positions": POSITIONS, "eos_token_id": 257, "activation_function": "gelu_new",
        "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_a_chat_on_a_terminal(stored_model: Path, tmp_path: Path) -> None:
    saved = tmp_path / "chat.jsonl"
    settings = ["rollout.max_new_tokens=5", "trainer.accelerator=cpu", "--system", "Be brief, 'please'."]
    shell = Terminal([sys.executable, "-m", "megarl", "chat", f"model.path={stored_model}", *settings])
    try:
        shell.wait_for("/help lists.*> ")
        shell.type("/show")
        assert "Be brief, 'please'." in shell.wait_for("temperature=1.0.*> ")
        shell.type("/set temprature 0")
        assert "did you mean temperature" in shell.wait_for("error: .*> ")
        shell.type("hello")
        shell.wait_for("hello\r\n.*> ")
        shell.type("/compare " + str(stored_model))
        shell.wait_for("answers too.*> ")
        shell.type("/set temperature 0")
        shell.wait_for("temperature=0.0.*> ")
        shell.type("again")
        both = shell.wait_for("--- .*--- .*> ").split("--- ")[1:]
        assert both[0].splitlines()[0] == both[1].splitlines()[0] == str(stored_model)
        shell.type("/compare off")
        shell.wait_for("answers alone.*> ")
        shell.type("/set max_new_tokens 16000")
        shell.wait_for("16000.*> ")
        shell.type("/set temperature 1")
        shell.wait_for("temperature=1.0.*> ")
        shell.type("go")
        shell.wait_for("go\r\n.{20}")  # it is streaming
        shell.interrupt()
        assert len(shell.wait_for(r"\(stopped\).*> ")) < 16000
        shell.type(f"/save {saved}")
        shell.wait_for("saved to.*> ")
        os.write(shell.fd, b"\x04")
        assert shell.process.wait(timeout=60) == 0
    finally:
        shell.close()
    (line,) = saved.read_text().splitlines()
    messages = json.loads(line)["messages"]
    assert [message["role"] for message in messages] == ["system", *["user", "assistant"] * 3]
    assert [len(message["content"]) for message in messages[2:5:2]] == [5, 5]
    assert 20 <= len(messages[-1]["content"]) < 16000
