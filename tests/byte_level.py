"""A Hugging Face tokenizer whose tokens are bytes, so that it encodes every text without having learned any."""

from __future__ import annotations

from typing import Any


def byte_level(end: str, **special: str) -> Any:
    """A tokenizer with `end` as its EOS, and other special tokens by their names, such as `bos_token`."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(vocab={**letters, end: len(letters)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token=end, **special)
