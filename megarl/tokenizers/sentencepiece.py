"""SentencePiece model files. The library is imported when a tokenizer is made."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from megarl.disk import is_dir, is_file, local, shown
from megarl.errors import ConfigError, UnavailableError
from megarl.tokenizers.base import Tokenizer, digest, write_marker
from megarl.tokenizers.published import unusable

SENTENCEPIECE_FILE = "tokenizer.model"


class SentencePieceTokenizer(Tokenizer):
    """A SentencePiece model file; texts start with BOS where the model defines one."""

    kind = "sentencepiece"

    def __init__(self, path: str | Path) -> None:
        """Load a model from its file, or from a folder that holds it as `tokenizer.model`."""
        try:
            from sentencepiece import SentencePieceProcessor
        except ImportError as error:
            raise UnavailableError(
                "tokenizer.kind=sentencepiece: pip install sentencepiece", key="tokenizer.kind", value=self.kind
            ) from error
        self.path = local(path)
        if is_dir(self.path):
            self.path = self.path / SENTENCEPIECE_FILE
        if not is_file(self.path):
            raise ConfigError(
                f"tokenizer.path={shown(path)!r}: no such file; give a SentencePiece .model file",
                key="tokenizer.path",
                value=str(path),
            )
        self._processor = SentencePieceProcessor()
        try:
            self._processor.Load(str(self.path))
        except (OSError, RuntimeError) as error:
            raise unusable(path, " is not a SentencePiece model; give a .model file") from error
        if self._processor.eos_id() < 0:
            raise unusable(path, " has no EOS, so no response could end; train the SentencePiece model with an eos_id")
        self.size = self._processor.GetPieceSize()
        self.eos_id = self._processor.eos_id()
        self.pad_id = self._processor.pad_id() if self._processor.pad_id() >= 0 else self.eos_id
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.adds_bos = self.bos_id is not None
        self._special = {
            self._processor.IdToPiece(token): token for token in range(self.size) if self._processor.IsControl(token)
        }
        self._fingerprint = digest([self.kind, hashlib.sha256(self.path.read_bytes()).hexdigest()])

    def encode(self, text: str) -> list[int]:
        """Return the ids of the pieces, without BOS."""
        return list(self._processor.EncodeAsIds(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text; control tokens are left out."""
        special = set(self._special.values())
        kept = [int(token) for token in ids if 0 <= token < self.size and int(token) not in special]
        return str(self._processor.DecodeIds(kept))

    def save(self, folder: str | Path) -> None:
        """Copy the model file."""
        write_marker(folder, self)
        target = Path(folder) / SENTENCEPIECE_FILE
        if target.resolve() != self.path.resolve():
            shutil.copyfile(self.path, target)

    def fingerprint(self) -> str:
        """Return a hash of the model file."""
        return self._fingerprint

    @property
    def special_tokens(self) -> dict[str, int]:
        """Return the model's control tokens."""
        return dict(self._special)
