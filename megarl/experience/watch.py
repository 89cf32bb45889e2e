"""Checks of each phase's numbers: what cannot be trained on ends the run, what looks wrong is logged once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from megarl.errors import NumericsError
from megarl.logging import get_logger
from megarl.parallel.rows import Rows

EQUAL_PHASES = 2  # phases in a row with equal scores, before a warning
log = get_logger(__name__)


class Watch:
    """Watches the phases of a run."""

    def __init__(self, kl_limit: float | None) -> None:
        """`kl_limit` is the largest KL to the reference per response; None: any."""
        self.kl_limit = kl_limit
        self.kl_warned = False
        self.equal_phases = 0  # phases in a row with equal scores
        self.short_warned = False

    def finite(self, rows: Rows, columns: Sequence[str], names: Sequence[str], phase: int) -> None:
        """Refuse columns that have NaN or infinity. They are the same on every rank.

        Args:
            rows: the rows of a phase.
            columns: the names of the columns to check.
            names: what messages call each row.
            phase: number of the phase, from 1.
        """
        for column in columns:
            wrong = (~torch.isfinite(rows[column])).any(dim=1).nonzero()
            if len(wrong):
                where = names[int(wrong[0])]
                raise NumericsError(
                    f"{where}: {column} in phase {phase} has NaN or infinity: check the weights (a lower optim.lr, an "
                    "earlier checkpoint) and the scores of this response",
                    key=column,
                    where=where,
                )

    def kl(self, kl: float) -> None:
        """Warn when the KL to the reference exceeds half of ppo.kl_limit; stop the run when it exceeds the limit."""
        limit = self.kl_limit
        if limit is None:
            return
        if kl > limit:
            raise NumericsError(
                f"the KL to the reference is {kl:.4g} per response, above ppo.kl_limit={limit:g}: raise ppo.kl_coef, "
                "lower optim.lr, or resume from an earlier checkpoint (run.resume)",
                key="ppo.kl_limit",
                value=limit,
            )
        if kl > limit / 2 and not self.kl_warned:
            self.kl_warned = True
            log.warning("the KL to the reference is %.4g per response, above half of ppo.kl_limit=%g", kl, limit)

    def scores(self, stats: Mapping[str, float], groups: int) -> None:
        """Warn once when the scores of several phases in a row do not differ. `groups` is the number of prompts."""
        all_equal = stats["rollout/score_std"] == 0
        no_signal = all_equal or stats.get("rollout/zero_spread_groups") == groups
        self.equal_phases = self.equal_phases + 1 if no_signal else 0
        if self.equal_phases == EQUAL_PHASES:
            log.warning(
                "all responses %sof %d phases in a row scored %s: they give no signal to learn from; "
                "check reward.fn (rollout.dump writes the responses to a folder)",
                "" if all_equal else "to a prompt ",
                EQUAL_PHASES,
                f"{stats['rollout/score']:.4g}" if all_equal else "the same",
            )

    def short_phase(self, found: int, wanted: int) -> None:
        """Warn once when replacing prompts has reached its limit."""
        if not self.short_warned:
            self.short_warned = True
            log.warning(
                "a phase has %d of %d prompts, as ppo.dynamic_sampling.limit is reached: the responses to all others "
                "have equal scores (rollout/replaced counts them in every phase)",
                found,
                wanted,
            )
