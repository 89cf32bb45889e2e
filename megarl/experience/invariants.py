"""Invariants that every run must meet, checked while it runs. A violation is reported by the invariant's name."""

from __future__ import annotations

from collections.abc import Callable

from megarl.errors import InvariantError
from megarl.logging import get_logger
from megarl.parallel.device import device_settings
from megarl.parallel.engine import Engine

RATIO_BOUND = {"fp32": 1e-5, "bf16": 5e-2}  # on |ratio - 1| before the first step; matrix products differ by shape
DRIFT_BOUND = {"fp32": 1e-3, "bf16": 5e-2}  # on the mean |sampled log-prob - recomputed log-prob|
KL_BOUND_GPU = {"fp32": 1e-4, "bf16": 5e-2}  # on a token's |policy - reference log-prob|; 0 on a CPU
CLIPPED_BOUND_BF16 = 0.05  # on the share of clipped tokens

log = get_logger(__name__)


class Invariants:
    """Checks of a PPO run. `mode` is what a violation does: `strict` stops the run, `warn` logs it once."""

    def __init__(self, mode: str, precision: str, phase: Callable[[], int]) -> None:
        """`phase()` returns the number of completed phases."""
        self.strict, self.precision, self.phase = mode == "strict", precision, phase
        self.checked: dict[str, bool] = {}  # by engine that began to train here: whether its gradients were checked
        self.warned: set[str] = set()

    def same_weights(self, largest_kl: float) -> None:
        """Check that the policy equals its reference before the first update."""
        bound = 0.0 if device_settings().repeats_exactly else KL_BOUND_GPU[self.precision]
        self._expect(
            "kl_zero",
            largest_kl,
            largest_kl <= bound,
            f"KL to the reference is {largest_kl:.2e} before any update, not {bound:g}",
        )

    def drift(self, mean: float) -> None:
        """Check that generation and training compute the same log-probs."""
        bound = DRIFT_BOUND[self.precision]
        self._expect(
            "logprob_drift",
            mean,
            mean <= bound,
            f"sampled and recomputed log-probs differ by {mean:.2e} > {bound:g}",
        )

    def on_policy(self, ratio: float, clipped: float, narrowest: float) -> None:
        """Check that the policy is unchanged since the evaluation when the first minibatch of a phase starts.

        Args:
            ratio: mean ratio.
            clipped: share of clipped tokens.
            narrowest: the smaller clip range.
        """
        bound = RATIO_BOUND[self.precision]
        self._expect("ratio_one", ratio, abs(ratio - 1) <= bound, f"the first minibatch's ratio is {ratio:.7f}, not 1")
        # In bf16 the rounding of single tokens may pass a clip range, and often one that is narrower than the rounding.
        most = 0.0 if self.precision == "fp32" else CLIPPED_BOUND_BF16 if narrowest >= bound else 1.0
        self._expect("nothing_clipped", clipped, clipped <= most, f"{clipped:.2%} of the first minibatch is clipped")

    def tokens(self, counted: float, expected: float) -> None:
        """Check that an epoch trained on each response token once, over all ranks and microbatches."""
        self._expect(
            "token_count", counted, counted == expected, f"an epoch counted {counted:g} response tokens of {expected:g}"
        )

    def gradients(self, engine: Engine, learns: bool, *, fresh: bool) -> None:
        """Check that every trainable tensor has a nonzero gradient in an engine's first step that can learn.

        Args:
            engine: the engine whose gradients are checked.
            learns: whether the learning rate and the loss are nonzero.
            fresh: whether this is the first phase in which the engine trains.
        """
        if fresh:
            self.checked.setdefault(engine.name, False)
        if not learns or self.checked.get(engine.name, True):
            return
        self.checked[engine.name] = True
        with_gradient, trainable = engine.gradient_names()
        missed = sorted(trainable - with_gradient)
        shown = ", ".join(missed[:3]) + (f" and {len(missed) - 3} more" if len(missed) > 3 else "")
        self._expect("gradients", missed, not missed, f"no gradient has reached {shown} of {engine.name}")

    def _expect(self, name: str, value: object, holds: bool, problem: str) -> None:
        if holds:
            return
        message = f"invariant {name} is broken in phase {self.phase() + 1}: {problem}"
        if self.strict:
            raise InvariantError(
                f"{message} (ppo.invariants=warn logs it and continues)",
                key=name,
                value=value,
                offers={"ppo.invariants": ["warn"]},
            )
        if name not in self.warned:
            self.warned.add(name)
            log.warning("%s", message)
