"""A real T5 tokenizer, small: SentencePiece's unigram model of a few sentences, and sentinels."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

PIECES, SENTINELS = 120, 10
TEXTS = [
    "the cat sat on the mat and looked at the red bird in the tree",
    "a good film about a river, warm and slow; nobody was bored.",
    "what is the sum of 1 and 2? it is 3, not 4!",
    "translate English to German: the house is small",
    "summarize: the run wrote metrics, checkpoints and samples to its folder",
]


def save_pieces(folder: Path) -> Any:
    """Save `spiece.model` as T5's folders on the hub have it: padding 0, EOS 1, unknown 2, no BOS. Return the model."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 4),
        model_writer=model,
        vocab_size=PIECES,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "spiece.model").write_bytes(model.getvalue())
    settings = {"tokenizer_class": "T5Tokenizer", "extra_ids": SENTINELS}
    settings |= {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def save_tokenizer(folder: Path) -> Any:
    """Save the same as `tokenizer.json`. Return transformers' tokenizer."""
    from transformers import AutoTokenizer

    save_pieces(folder)
    made = AutoTokenizer.from_pretrained(folder)
    (folder / "spiece.model").unlink()
    made.save_pretrained(folder)
    return made


def save_model(folder: Path, **changes: Any) -> Any:
    """Save a small random T5 with the tokenizer. Return transformers' model."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    size = len(save_tokenizer(folder)) + 3  # as T5's 32128 rows for 32100 tokens
    torch.manual_seed(0)
    shape = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": size}
    model = T5ForConditionalGeneration(
        T5Config(**{**shape, "decoder_start_token_id": 0, "dropout_rate": 0.0, **changes})
    ).eval()
    model.save_pretrained(folder)
    return model
