"""The families of published models that megarl reads and writes, one declarative file each."""

from typing import Any

from megarl.config.sections.model import ModelConfig
from megarl.disk import shown
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.families import gpt2, gpt_neox, gptj, llama, mistral, opt, qwen2, qwen3
from megarl.models.exchange.family import CLASSIFIER, Family

# A model that several families can represent is exported as the first of them.
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, gpt2, gptj, gpt_neox, opt)
}


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
        f"{', '.join(known)}{other}",
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
    nearest = sorted(lacking, key=lambda name: lacking[name].words.count("model."))
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
