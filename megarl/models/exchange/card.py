"""The model card in a checkpoint, with which it can be read and exported without its run's settings."""

from dataclasses import asdict, dataclass
from typing import Any

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.models.exchange.export import token_ids
from megarl.models.exchange.source import Source, family_name
from megarl.tokenizers import Tokenizer


@dataclass(frozen=True)
class ModelCard:
    """Shape, vocabulary size, the family in which the model was published (None: made from scratch), tokenizer, and the
    run's chat template (None: the tokenizer's own)."""

    model: ModelConfig
    vocab_size: int
    family: str | None
    tokenizer: Tokenizer
    tokenizer_path: str | None
    chat_template: str | None = None
    score_moments: tuple[float, float] | None = None
    """Mean and standard deviation of a reward model's scores on its reference set."""
    reward_kind: str | None = None
    """What a reward model was trained on (`rm.kind`)."""

    @classmethod
    def of(
        cls,
        model: ModelConfig,
        vocab_size: int,
        tokenizer: Tokenizer,
        settings: TokenizerConfig,
        chat_template: str | None = None,
        source: Source | None = None,
    ) -> "ModelCard":
        """Build the card; `source` is the stored model that the weights started from."""
        return cls(model, vocab_size, family_name(source), tokenizer, settings.path, chat_template)

    def plain(self) -> dict[str, Any]:
        """Return the card as plain values, for a checkpoint."""
        return {
            "config": asdict(self.model),
            "vocab_size": self.vocab_size,
            "family": self.family,
            "tokenizer": {"kind": self.tokenizer.kind, "path": self.tokenizer_path},
            "token_ids": token_ids(self.tokenizer),
            "chat_template": self.chat_template,
            "score_reads_eos": True,  # a reward model's training reads the score there
            "score_moments": None if self.score_moments is None else list(self.score_moments),
            "reward_kind": self.reward_kind,
        }
