"""Text to token ids and back: one interface over bytes, characters, SentencePiece and Hugging Face tokenizers.

Records and batches are not known here, and a library is imported only when its kind of tokenizer is built.
"""

from megarl.tokenizers.base import MARKER_FILE, Tokenizer, read_marker
from megarl.tokenizers.build import KINDS, build_tokenizer, load_tokenizer, tokenizer_of
from megarl.tokenizers.huggingface import HuggingFaceTokenizer
from megarl.tokenizers.sentencepiece import SentencePieceTokenizer
from megarl.tokenizers.small import ByteTokenizer, CharacterTokenizer

__all__ = [
    "KINDS",
    "MARKER_FILE",
    "ByteTokenizer",
    "CharacterTokenizer",
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "Tokenizer",
    "build_tokenizer",
    "load_tokenizer",
    "read_marker",
    "tokenizer_of",
]
