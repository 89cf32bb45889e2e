"""The families of published models that megarl reads and writes, one declarative file each."""

from collections.abc import Sequence
from typing import Any

from megarl.config.sections.model import ModelConfig
from megarl.disk import shown
from megarl.errors import CheckpointError, ConfigError
from megarl.functions import extensions
from megarl.logging import get_logger
from megarl.models.exchange.families import (
    gpt2,
    gpt_neox,
    gptj,
    llama,
    mistral,
    mixtral,
    mt5,
    opt,
    qwen2,
    qwen2_moe,
    qwen3,
    qwen3_moe,
    t5,
)
from megarl.models.exchange.family import CLASSIFIER, KINDS, Family

# A model that several families can represent is exported as the first of them.
FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        *(llama.FAMILY, mistral.FAMILY, qwen2.FAMILY, qwen3.FAMILY),
        *(mixtral.FAMILY, qwen2_moe.FAMILY, qwen3_moe.FAMILY),
        *(gpt2.FAMILY, gptj.FAMILY, gpt_neox.FAMILY, opt.FAMILY, t5.FAMILY, mt5.FAMILY),
    )
}


KEY = "extensions.families"
_ORIGINS: dict[str, str] = {}
"""Where each family outside of megarl comes from, by its name."""


def add_families(names: Sequence[str]) -> None:
    """Add the families that `extensions.families` names, in this process. The same name again is no second family."""
    for name in names:
        register_family(extensions.load(KEY, name, "NAME"), KEY, name)


def register_family(family: Any, key: str = "register_family", origin: str = "") -> None:
    """Add a family of models outside of megarl, in this process: from then on it is read, written and converted.

    Args:
        family: a `Family`. Its name and architectures must not be those of another.
        key: what gives it, for messages.
        origin: its name there; one of the same origin is replaced.
    """
    if not isinstance(family, Family):
        raise extensions.wrong_kind(key, origin, "a megarl.models.exchange.family.Family", family)
    origin = origin or family.name
    for name, known in FAMILIES.items():
        same = [each for each in family.architectures if each in known.architectures]
        if (name == family.name or same) and known is not family and _ORIGINS.get(name) != origin:
            what = f"the architecture {same[0]}" if same and name != family.name else "this name"
            of = _ORIGINS.get(name, "megarl's own")
            raise ConfigError(
                f"{key}={origin} is a family {family.name}, and there is one with {what} already: {name} ({of}); "
                "rename one of them, or leave it out",
                key=key,
                value=origin,
            )
    FAMILIES[family.name], _ORIGINS[family.name] = family, origin


def _add_announced() -> None:
    """Add the families of installed packages. One that is broken is left out, with a warning."""
    group = extensions.FAMILIES
    for point in extensions.announced(group).values():
        try:
            register_family(extensions.load(group, point.value, "NAME"), group, point.value)
        except ConfigError as problem:
            get_logger(__name__).warning("a family of %s is left out: %s", extensions.package_of(point), problem)


def family_of(config: dict[str, Any]) -> Family:
    """Return the family of a config.json, by its architecture, or by `model_type` if that is missing."""
    named = config.get("architectures") or []
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise CheckpointError(
            f"config.json has architectures={shown(repr(named))}, which is not a list of names: restore it",
            key="architectures",
            value=named,
            where="config.json",
        )
    for family in FAMILIES.values():
        if any(name in (*family.architectures, family.classifier) for name in named) or (
            not named and config.get("model_type") == family.name
        ):
            return family
    key = "architectures" if named else "model_type"
    known = [family.architectures[0] if named else name for name, family in FAMILIES.items()]
    score = any(str(name).endswith(CLASSIFIER) for name in named)
    other = ", or score with reward.fn=megarl.rewards.classifier:score" if score else ""
    raise CheckpointError(
        f"config.json has {key}={shown(repr(config.get(key)))}, which megarl does not know: choose from "
        f"{', '.join(known)}{other}; a family of yours: extensions.families=[package.module:NAME]",
        key=key,
        value=config.get(key),
        where="config.json",
        offers={key: known},
    )


def family_for(model: ModelConfig, name: str | None = None) -> Family:
    """Return the family to write a model as: the named one, else the first that can represent it."""
    if name is not None:
        return family_named(name)
    for family in FAMILIES.values():
        if family.holds(model):
            return family
    lacking = {name: lacks for name, family in FAMILIES.items() if (lacks := family.lacks(model))}
    nearest = sorted(lacking, key=lambda name: (lacking[name].key in KINDS, lacking[name].words.count("model.")))
    ways = "; ".join(f"{name} has no {lacking[name].words}" for name in nearest[:3])
    first = lacking[nearest[0]]
    raise ConfigError(
        f"no family of Hugging Face's can represent this model ({ways}): change these keys before training, or keep "
        "megarl's own checkpoints",
        key=first.key,
        value=first.value,
    )


def require_family(model: ModelConfig, name: str | None, key: str) -> None:
    """Raise before training if the model could not be exported to the named family, or to any."""
    try:
        family = family_for(model, name)
    except ConfigError as problem:
        raise problem.within(key) from None
    lacks = family.lacks(model)
    if lacks:
        raise ConfigError(
            f"{key}: a {family.name} cannot have {lacks.words}: change these keys before training",
            key=lacks.key,
            value=lacks.value,
            where=key,
        )


def family_named(name: str) -> Family:
    """Return the family with this name; raise `ConfigError` if it is unknown."""
    if name not in FAMILIES:
        raise ConfigError(
            f"family={name} is unknown: use one of {', '.join(FAMILIES)}",
            key="family",
            value=name,
            offers={"family": FAMILIES},
        )
    return FAMILIES[name]


_add_announced()
