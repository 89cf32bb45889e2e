"""The families of published models that megarl reads and writes: a declarative file each."""

from typing import Any

from megarl.config.schema import ModelConfig
from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.families import gpt2, gpt_neox, gptj, llama, mistral, opt, qwen2, qwen3
from megarl.models.exchange.family import Family

# A model that several families can hold is exported as the first of them.
FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY for module in (llama, mistral, qwen2, qwen3, gpt2, gptj, gpt_neox, opt)
}


def family_of(config: dict[str, Any]) -> Family:
    """The family that a config.json belongs to, by its architecture, or by `model_type` where that is missing."""
    named = config.get("architectures") or []
    for family in FAMILIES.values():
        if any(name in family.architectures for name in named) or (
            not named and config.get("model_type") == family.name
        ):
            return family
    known = ", ".join(family.architectures[0] for family in FAMILIES.values())
    found = named[0] if named else config.get("model_type", "no architecture at all")
    raise CheckpointError(f"config.json is of {found}, which megarl does not know: it knows {known}")


def family_for(model: ModelConfig, name: str | None = None) -> Family:
    """The family to write a model as: the one named, else the first that can hold it."""
    if name is not None:
        return family_named(name)
    for family in FAMILIES.values():
        if family.holds(model):
            return family
    reasons = (
        f"{name} has no {family.difference(model, family.write(model) | {'tie_word_embeddings': model.tie_embeddings})}"
        for name, family in FAMILIES.items()
    )
    raise ConfigError(f"no family of Hugging Face's can hold this model ({'; '.join(reasons)})")


def family_named(name: str) -> Family:
    if name not in FAMILIES:
        raise ConfigError(f"family={name} is unknown: use one of {', '.join(FAMILIES)}")
    return FAMILIES[name]
