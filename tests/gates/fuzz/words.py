"""Tokenizers: folders of each kind, built, loaded, and asked for ids, text and a rendered conversation."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

from megarl.models.exchange.source import tokenizer_of
from megarl.tokenizers import build_tokenizer, load_tokenizer
from tests.gates.fuzz import mutate
from tests.gates.fuzz.check import Case

KINDS = ("huggingface", "sentencepiece", "characters", "bytes")
CHAT = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how are you"}]


def make_store(store: Path) -> None:
    """A well-formed folder of each kind."""
    from sentencepiece import SentencePieceTrainer

    from tests.test_tokenizers import CHATML, make_hugging_face

    plain = store / "plain"
    plain.mkdir()
    make_hugging_face(plain / "huggingface", chat_template=CHATML, bos=True)
    (plain / "text.txt").write_text("the cat sat on the mat\nthe dog ate the hat\nuser assistant end\n" * 20)
    SentencePieceTrainer.train(
        input=str(plain / "text.txt"),
        model_prefix=str(plain / "tokenizer"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    (plain / "sentencepiece").mkdir()
    shutil.move(plain / "tokenizer.model", plain / "sentencepiece" / "tokenizer.model")
    (plain / "characters").mkdir()
    (plain / "characters" / "alphabet.txt").write_text("abcdehlorwuy <|>_nst")
    for kind in KINDS:
        build_tokenizer(kind, str(plain / kind)).save(store / kind)
    shutil.rmtree(plain)


def cases(seed: int, count: int, store: Path) -> list[Case]:
    if not (store / "bytes").is_dir():
        make_store(store)
    return [_case(Random(f"words {seed} {number}"), f"{seed}.{number}", store) for number in range(count)]


def _case(draw: Random, number: str, store: Path) -> Case:
    kind = draw.choices(KINDS, (5, 2, 2, 1))[0]
    file = draw.choice(sorted(path.name for path in (store / kind).iterdir()))
    content = (store / kind / file).read_bytes()
    spoilt: bytes | None
    if file.endswith(".json") and draw.random() < 0.7:
        what, tree = mutate.tree(draw, json.loads(content))
        spoilt = mutate.dumps(tree).encode("utf-8", "surrogatepass")
    elif draw.random() < 0.15:
        what, spoilt = "is missing", None
    elif file.endswith((".txt", ".jinja", ".json")) and draw.random() < 0.5:
        what, spoilt = mutate.text(draw, content.decode())
    else:
        what, spoilt = mutate.data(draw, content)

    def lay(folder: Path) -> None:
        shutil.copytree(store / kind, folder / "tokenizer")
        mutate.put(folder / "tokenizer" / file, spoilt)

    return Case(
        f"words {kind} {number}: {file} {what}", lay, _reader(draw, kind), ("tokenizer.", "turn", "chat template")
    )


def _reader(draw: Random, kind: str) -> Callable[[Path], object]:
    way = draw.choice(("built", "loaded", "found"))

    def act(folder: Path) -> None:
        path = folder / "tokenizer"
        if way == "found":
            found = tokenizer_of(path)
            if found is None:
                return
            tokenizer = build_tokenizer(*found)
        else:
            tokenizer = load_tokenizer(path) if way == "loaded" else build_tokenizer(kind, str(path))
        ids = tokenizer.encode_prompt("hello world")
        assert all(isinstance(token, int) and 0 <= token < tokenizer.size for token in ids), ids
        assert 0 <= tokenizer.eos_id < tokenizer.size
        assert 0 <= tokenizer.pad_id < tokenizer.size
        tokenizer.decode([*ids, 10**6, -1])
        tokenizer.apply_chat_template(CHAT, True)

    return act
