"""The requirements of each kind of advantages; `experience.advantages` computes them."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from megarl.errors import ConfigError
from megarl.functions.extensions import load, wrong_kind
from megarl.functions.named import parameters, resolve


@dataclass(frozen=True)
class Needs:
    """Requirements and properties of one kind of advantages.

    Attributes:
        values: whether it needs a critic, which predicts returns.
        groups: whether it compares several responses per prompt.
        greedy: whether it needs the score of the greedy response to each prompt.
        whitened: whether advantages are whitened if `ppo.whiten_advantages` is null.
        unread: keys of the `ppo` section that have no effect.
    """

    values: bool = False
    groups: bool = False
    greedy: bool = False
    whitened: bool = False
    unread: tuple[str, ...] = ("gamma", "lam", "clip_value", "vf_coef")


_DISCOUNTED = ("lam", "clip_value", "vf_coef")

ADVANTAGES: dict[str, Needs] = {
    "gae": Needs(values=True, whitened=True, unread=()),
    "grpo": Needs(groups=True),
    "dr_grpo": Needs(groups=True),
    "rloo": Needs(groups=True),
    "reinforce_pp": Needs(whitened=True, unread=_DISCOUNTED),
    "reinforce_pp_baseline": Needs(groups=True, whitened=True),
    "remax": Needs(greedy=True),
    "opo": Needs(groups=True),
}
"""The kinds of advantages by the value of `ppo.advantages`."""

ARGUMENTS = ("rewards", "scores", "mask", "groups", "values", "greedy", "gamma", "lam")
"""What a function of the user may take, by keyword; `experience.advantages.arguments_of` gives them."""


def needs_of(advantages: str) -> Needs:
    """Return the requirements of a kind of advantages, or of a function of the user, which its parameters tell."""
    return ADVANTAGES[advantages] if advantages in ADVANTAGES else _needs_of_function(advantages)


def _needs_of_function(name: str) -> Needs:
    key = "ppo.advantages"
    takes = parameters(resolve(name, key))
    if takes is None:  # wrapped, imported, or with **kwargs: only the object itself tells
        function = load(key, name)
        try:
            kinds = inspect.signature(function).parameters.values()
        except (TypeError, ValueError):
            raise wrong_kind(key, name, f"a function of {', '.join(ARGUMENTS)}", function) from None
        takes = [one.name for one in kinds if one.kind is not inspect.Parameter.VAR_KEYWORD]
    unknown = [argument for argument in takes if argument not in ARGUMENTS]
    if unknown:
        raise ConfigError(
            f"{key}={name} has the parameter {unknown[0]}, which a phase does not give: name any of "
            f"{', '.join(ARGUMENTS)}, or **others for all of them",
            key=key,
            value=name,
        )
    values = "values" in takes
    discounts = [argument for argument in ("gamma", "lam") if argument not in takes]
    return Needs(
        values=values,
        groups="groups" in takes,
        greedy="greedy" in takes,
        unread=(*discounts, *(() if values else ("clip_value", "vf_coef"))),
    )


UNREAD: dict[str, tuple[str, ...]] = {"clipped": (), "cispo": (), "plain": ("clip_low", "clip_high", "ratio")}
"""Keys of the `ppo` section that have no effect, by the value of `ppo.objective`."""


def critic_kind(config: Any) -> str:
    """Return `critic.kind` (shared, separate or none), or none if the advantages of this run need no values."""
    return str(config.critic.kind) if needs_of(config.ppo.advantages).values else "none"


def whitens(ppo: Any) -> bool:
    """Return whether the advantages of this run are whitened."""
    return needs_of(ppo.advantages).whitened if ppo.whiten_advantages is None else bool(ppo.whiten_advantages)


def without_effect(config: Any) -> dict[str, list[str]]:
    """Return the keys whose value is not the default and has no effect in this run, by the setting that ignores
    them."""
    ppo, critic = config.ppo, config.critic
    needs, default = needs_of(ppo.advantages), type(ppo)()
    by_advantages = [f"ppo.{key}" for key in needs.unread if getattr(ppo, key) != getattr(default, key)]
    if not needs.values:
        standard = type(critic)()
        if critic.kind not in (standard.kind, "none"):
            by_advantages.append("critic.kind")
        own, usual = vars(critic.settings), vars(standard.settings)
        by_advantages += [f"critic.separate.{key}" for key, value in own.items() if value != usual[key]]
    by_objective = [f"ppo.{key}" for key in UNREAD[ppo.objective] if getattr(ppo, key) != getattr(default, key)]
    overlong, mixing, none = ppo.long_responses, config.data.mixing, type(ppo.long_responses)()
    by_penalty = ["ppo.overlong.buffer"] if overlong.penalty == 0 and overlong.buffer != none.buffer else []
    constant = mixing is not None and not mixing.final_weights
    by_weights = ["data.mixing.over_phases"] if constant and mixing.over_phases is not None else []
    adapted = {f"ppo.{name}": getattr(ppo, name) for name in ("adaptive_kl", "adaptive_entropy")}
    without_target = {
        f"{key}.target=null": [key]
        for key, section in adapted.items()
        if section is not None and section.target is None
    }
    found = {
        f"ppo.advantages={ppo.advantages}": by_advantages,
        f"ppo.objective={ppo.objective}": by_objective,
        "ppo.overlong.penalty=0": by_penalty,
        "data.mixing.final_weights=[]": by_weights,
        **without_target,
    }
    return {setting: keys for setting, keys in found.items() if keys}
