"""Open a run's pretrained models once, check them, and take over their shape and tokenizer, before building any."""

from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from megarl.checkpoint import verify
from megarl.command import process_number
from megarl.config.leaf import or_defaults
from megarl.config.offers import enforce
from megarl.config.rules import experts_suit_run
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.config.shape import check_shape
from megarl.errors import CheckpointError, ConfigError, MegarlError
from megarl.logging import get_logger
from megarl.models.exchange.adapters import PeftAdapter, StoredAdapter, family_of_parts, new_spec, targets_of
from megarl.models.exchange.families import add_families
from megarl.models.exchange.family import shape_of
from megarl.models.exchange.formats import open_adapter, open_source
from megarl.models.exchange.source import Source, family_name
from megarl.tokenizers import tokenizer_of

Tree = TypeVar("Tree", bound=Any)
log = get_logger(__name__)
OURS = ("dropout", "init_std", "num_layers_unfrozen")
"""Keys of `model` that the user sets; all others are taken from the stored model."""


class Sources:
    """The stored models of a run, by path. Each is opened once per process and stays open until `close`."""

    def __init__(self) -> None:
        self._opened: dict[str, Source] = {}
        self._adapters: dict[str, StoredAdapter] = {}

    def at(self, path: str | None) -> Source | None:
        """Return the stored model at a path; None if the path is null."""
        if path is None:
            return None
        if path not in self._opened:
            source = open_source(path)
            self._opened[path] = self._opened[str(source.path)] = source
        return self._opened[path]

    def whole(self, path: str, key: str) -> Source:
        """Return the stored model at the path of a configuration key.

        The first process reads a whole megarl checkpoint to compare its checksums.
        """
        try:
            source = self.at(path)
        except MegarlError as refused:
            raise refused.within(f"{key}={path}") from None
        assert source is not None
        _verify(source.checkpoints, key)
        return source

    def adapter_at(self, path: str, model: ModelConfig, family: str | None) -> StoredAdapter:
        """Return the stored adapter at the path of `adapter.path`, for a model of a family."""
        if path not in self._adapters:
            try:
                adapter = open_adapter(path)
                if isinstance(adapter, PeftAdapter):
                    adapter.fit(model, family_of_parts(model, family))
                    adapter.require_complete()
            except MegarlError as refused:
                raise refused.within(f"adapter.path={path}") from None
            _verify([] if isinstance(adapter, PeftAdapter) else [adapter.path], "adapter.path")
            self._adapters[path] = adapter
        return self._adapters[path]

    def close(self) -> None:
        """Close the files and unpacked archives, once every model is built."""
        self._opened.clear()
        self._adapters.clear()


def _verify(checkpoints: list[Path], key: str) -> None:
    """Compare the checksums of megarl checkpoints on the first process. Raise for one that is not whole."""
    for folder in checkpoints if process_number() == 0 else ():
        problem = verify(folder)
        if problem:
            raise CheckpointError(
                f"{key}={folder} is not whole: {problem}", key=problem.key, value=problem.value, where=folder
            )


def resolve_pretrained(config: Tree) -> tuple[Tree, Sources]:
    """Open and check the models that an entry point's configuration tree starts from.

    Returns:
        The tree with the shape and the tokenizer of the model at `model.path`, or with the start token of a new
        encoder-decoder (else the same tree), and all models that the tree names. The tree that was passed in is not
        changed.
    """
    add_families(or_defaults(config, "extensions").families)
    sources = Sources()
    if config.model.path is not None:
        config = _with_shape(config, sources.whole(config.model.path, "model.path"))
    elif config.model.encoder is not None:
        config = _with_start(config)
    if getattr(config, "adapter", None) is not None:
        config = resolve_adapter(config, sources)
    for key, path in config.more_models().items():
        sources.whole(path, key)
    return config, sources


def adapters(config: Any, sources: Sources, model: ModelConfig, *, starts: bool = True) -> dict[str, Any]:
    """Return the arguments of `Role` that give a model that trains the adapters of a run's settings.

    Args:
        config: the configuration tree.
        sources: the run's stored models.
        model: the shape of the model.
        starts: whether it starts from the adapter at `adapter.path`; a separate critic does not.
    """
    if config.adapter is None:
        return {}
    family = family_name(sources.at(model.path))
    spec, path = new_spec(config.adapter, model, family), config.adapter.path
    stored = sources.adapter_at(path, model, family) if starts and path is not None else None
    return {"adapter": spec, "adapter_source": stored}


def resolve_adapter(config: Tree, sources: Sources) -> Tree:
    """Return the tree with the description of the adapter at `adapter.path`, if there is one, and with the same names
    for the same targets. Of an adapter of the last layers, the others stay without one. Raise for targets that the
    model does not have."""
    settings, model = config.adapter, config.model
    family = family_name(sources.at(model.path))
    if settings.path is not None:
        spec = sources.adapter_at(settings.path, model, family).spec
        targets = [module for parts in spec.parts.values() for module in parts.modules]
        settings = replace(
            settings, kind=spec.kind, rank=spec.rank, alpha=spec.alpha, rslora=spec.rslora, targets=targets
        )
        log.info(
            "adapter.path=%s gives kind=%s rank=%s alpha=%g rslora=%s targets=%s",
            *(settings.path, spec.kind, spec.rank, spec.alpha, spec.rslora, ",".join(targets)),
        )
        if spec.first_layer > 0 and model.num_layers_unfrozen < 0:
            model = replace(model, num_layers_unfrozen=model.layers - spec.first_layer)
            log.info(
                "adapter.path=%s is of the last layers: model.num_layers_unfrozen=%d",
                settings.path,
                model.num_layers_unfrozen,
            )
    settings = replace(settings, targets=targets_of(new_spec(settings, model, family), model))
    resolved: Tree = replace(config, adapter=settings, model=model)
    return resolved


def _with_shape(config: Tree, source: Source) -> Tree:
    """Return the tree with `model` taken from a stored model, and `tokenizer` too if it has its default. Raise if the
    model does not fit the layout or the sequence length."""
    model, tokenizer = _model_of(config, source), _tokenizer_of(config.tokenizer, source)
    check_shape(model, config.parallel)
    enforce([experts_suit_run], replace(config, model=replace(model, path=None)), config.parallel.tp)
    if getattr(getattr(config, "data", None), "seq_length", 0) > model.max_positions:
        raise ConfigError(
            f"data.seq_length={config.data.seq_length} is more than the {model.max_positions} positions of "
            f"model.path={source.path}: use data.seq_length={model.max_positions} or less",
            key="data.seq_length",
            value=config.data.seq_length,
            where=source.path,
            offers={"data.seq_length": [model.max_positions]},
        )
    shape = " ".join(f"{key}={value}" for key, value in shape_of(model).items() if value not in (None, False))
    log.info("model.path=%s gives vocab_size=%s %s", source.path, source.vocab_size, shape)
    resolved: Tree = replace(config, model=model, tokenizer=tokenizer)
    return resolved


def _with_start(config: Tree) -> Tree:
    """Return the tree with the start token of an encoder-decoder with random weights: padding, if it has none.

    T5 starts with padding, too. A start token that is also a letter would make a text that begins with it look as if it
    had not begun, because relative positions do not count equal tokens.
    """
    encoder = config.model.encoder
    if encoder.start_id is not None:
        return config
    encoder = replace(encoder, start_id=tokenizer_of(config).pad_id)
    resolved: Tree = replace(config, model=replace(config.model, encoder=encoder))
    return resolved


def second_model(config: Any, key: str, path: str | None, vocab_size: int, sources: Sources) -> ModelConfig:
    """Return the shape of the model at the path of a key, or the policy's if that is null.

    Raise if that model cannot read sequences of a policy with that vocabulary.
    """
    source = sources.at(path)
    if source is None:
        policy: ModelConfig = config.model
        return policy
    model = model_at(config, source)
    for name, policys in (("vocab_size", vocab_size), ("max_positions", config.model.max_positions)):
        its = getattr(model, name)
        if its < policys:
            raise ConfigError(
                f"{key}={path} has {name}={its}, but the policy's sequences need {policys}: use a model that was "
                f"trained with the policy's tokenizer and context, or {key}=null",
                key=name,
                value=its,
                where=path,
                offers={key: [None]},
            )
    return model


def model_at(config: Any, source: Source) -> ModelConfig:
    """Return the shape of a stored model beside the policy. Raise if it does not fit the layout."""
    model = _model_of(config, source)
    check_shape(model, config.parallel)
    return model


def _model_of(config: Any, source: Source) -> ModelConfig:
    kept = {key: getattr(config.model, key) for key in OURS}
    return replace(source.model, path=str(source.path), vocab_size=source.vocab_size, **kept)


def _tokenizer_of(tokenizer: TokenizerConfig, source: Source) -> TokenizerConfig:
    if source.tokenizer is None or tokenizer.path is not None:
        return tokenizer
    kind, path = source.tokenizer
    if tokenizer.kind == kind or (tokenizer.kind == "bytes" and kind != "bytes"):
        log.info("the tokenizer is model.path's: tokenizer.kind=%s tokenizer.path=%s", kind, path)
        return replace(tokenizer, kind=kind, path=path)
    return tokenizer
