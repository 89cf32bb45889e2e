"""What the settings of PPO are called in trlX and in TRL, and the keys of megarl that they are."""

from __future__ import annotations

from typing import Any


def ppo_settings(settings: Any) -> dict[str, Any]:
    """Return the keys for the settings that both libraries have, by their common names.

    Args:
        settings: has the attributes ppo_epochs, init_kl_coef, target (None: the coefficient stays), horizon, gamma,
            lam, cliprange, cliprange_value and vf_coef.
    """
    found = {
        "ppo.inner_epochs": settings.ppo_epochs,
        "ppo.kl_coef": settings.init_kl_coef,
        "ppo.gamma": settings.gamma,
        "ppo.lam": settings.lam,
        "ppo.clip_low": settings.cliprange,
        "ppo.clip_high": settings.cliprange,
        "ppo.clip_value": settings.cliprange_value,
        "ppo.vf_coef": settings.vf_coef,
    }
    if settings.target is not None and settings.init_kl_coef > 0:
        found |= {"ppo.adaptive_kl.target": settings.target, "ppo.adaptive_kl.horizon": settings.horizon}
    return found
