"""`model.path` before anything is built: the shape and the tokenizer of the stored model take their place in a run."""

import os
from dataclasses import replace
from typing import Any

from megarl.checkpoint import verify
from megarl.config.schema import ModelConfig
from megarl.config.shape import check_shape
from megarl.errors import CheckpointError, ConfigError, MegarlError
from megarl.logging import get_logger
from megarl.models.exchange.family import shape_of
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.source import Source

log = get_logger(__name__)
OURS = ("dropout", "init_std", "num_layers_unfrozen")
"""Keys of `model` that stay as they are set; all others are the stored model's."""


def adopt(config: Any) -> Source:
    """Fill `model` (and `tokenizer`, where it is at its default) of an entry's tree from `model.path`, in place.

    Opening the model checks its files; what does not fit the layout or the length is refused here too. Returns what was
    opened.
    """
    source = open_whole(config.model.path, "model.path")
    kept = {key: getattr(config.model, key) for key in OURS}
    config.model = replace(source.model, path=str(source.path), vocab_size=source.vocab_size, **kept)
    _adopt_tokenizer(config, source)
    check_shape(config.model, config.parallel)
    if getattr(getattr(config, "data", None), "seq_length", 0) > config.model.max_positions:
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} is more than the {config.model.max_positions} positions of "
            f"model.path={source.path}: use data.seq_length={config.model.max_positions} or less",
            key="data.seq_length",
            value=config.data.seq_length,
            where=source.path,
            offers={"data.seq_length": [config.model.max_positions]},
        )
    shape = " ".join(f"{key}={value}" for key, value in shape_of(config.model).items() if value not in (None, False))
    log.info("model.path=%s gives vocab_size=%s %s", source.path, source.vocab_size, shape)
    return source


def open_whole(path: str, key: str) -> Source:
    """A stored model. The checksums of a checkpoint of ours are compared, by the first process: that reads it all."""
    try:
        source = open_source(path)
    except MegarlError as refused:
        raise refused.within(f"{key}={path}") from None
    problem = verify(source.path) if source.kind == "megarl" and int(os.environ.get("RANK", "0")) == 0 else None
    if problem:
        raise CheckpointError(
            f"{key}={source.path} is not whole: {problem}", key=problem.key, value=problem.value, where=source.path
        )
    return source


def adopt_critic(config: Any, vocab_size: int) -> ModelConfig:
    """The model that `critic.path` holds, refused where it cannot judge sequences of a policy of that vocabulary; the
    policy's where the path is null."""
    if config.critic.path is None:
        policy: ModelConfig = config.model
        return policy
    source = open_source(config.critic.path)
    kept = {key: getattr(config.model, key) for key in OURS}
    critic = replace(source.model, path=str(source.path), vocab_size=source.vocab_size, **kept)
    for name, policys in (("vocab_size", vocab_size), ("max_positions", config.model.max_positions)):
        its = getattr(critic, name)
        if its < policys:
            raise ConfigError(
                f"critic.path={config.critic.path} has {name}={its}, but the policy's sequences need {policys}: use a "
                "critic that was trained with the policy's tokenizer and context, or critic.path=null",
                key=name,
                value=its,
                where=config.critic.path,
                offers={"critic.path": [None]},
            )
    check_shape(critic, config.parallel)
    return critic


def _adopt_tokenizer(config: Any, source: Source) -> None:
    tokenizer = config.tokenizer
    if source.tokenizer is None or tokenizer.path is not None:
        return
    kind, path = source.tokenizer
    if tokenizer.kind == kind or (tokenizer.kind == "bytes" and kind != "bytes"):
        tokenizer.kind, tokenizer.path = kind, path
        log.info("the tokenizer is model.path's: tokenizer.kind=%s tokenizer.path=%s", kind, path)
