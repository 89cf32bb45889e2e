"""The model card in a checkpoint, with which it can be read and exported without its run's settings."""

from dataclasses import asdict, dataclass
from typing import Any

import torch

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.models.adapter_spec import AdapterSpec
from megarl.models.exchange.export import token_ids
from megarl.models.exchange.source import Source, family_name
from megarl.models.roles import Role
from megarl.tokenizers import Tokenizer


@dataclass(frozen=True)
class AdapterCard:
    """Description of a policy's adapters, and of the weights beside them, which its checkpoints do not contain."""

    spec: AdapterSpec
    base: str | None
    """Path of the model that they are trained beside; None for weights made from the seed."""
    base_digests: dict[str, int]
    base_dtype: torch.dtype

    @classmethod
    def of(cls, role: Role, digests: dict[str, int], dtype: torch.dtype) -> "AdapterCard":
        """Build the card of a role's adapters; `digests` are those of its frozen parameters."""
        assert role.adapter is not None
        return cls(role.adapter, None if role.source is None else str(role.source.path), digests, dtype)

    def plain(self) -> dict[str, Any]:
        """Return the card as plain values, for a checkpoint."""
        spec = self.spec
        return {
            **{key: getattr(spec, key) for key in ("kind", "rank", "alpha", "rslora", "dropout", "family")},
            "targets": [module for parts in spec.parts.values() for module in parts.modules],
            "base": self.base,
            "base_digests": self.base_digests,
            "base_dtype": str(self.base_dtype).removeprefix("torch."),
        }


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
    adapter: AdapterCard | None = None
    """The adapters beside its weights, if only these train."""

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
            "adapter": None if self.adapter is None else self.adapter.plain(),
        }
