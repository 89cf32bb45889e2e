"""What must hold in every run, checked while it runs; each names itself when it breaks."""

from __future__ import annotations

from collections.abc import Callable

from megarl.errors import InvariantError
from megarl.logging import get_logger
from megarl.parallel.device import device_settings
from megarl.parallel.engine import Engine

RATIO_BOUND = {"fp32": 1e-5, "bf16": 5e-2}  # of |ratio - 1| before the first step; products differ by their shapes
DRIFT_BOUND = {"fp32": 1e-3, "bf16": 5e-2}  # of the mean |log-prob as drawn - as recomputed|
KL_BOUND_GPU = {"fp32": 1e-4, "bf16": 5e-2}  # of a token's |log-prob of the policy - of the reference|, not on a CPU
CLIPPED_BOUND_BF16 = 0.05  # share of tokens

log = get_logger(__name__)


class Invariants:
    """`mode` says what a broken one does: `strict` stops the run, `warn` logs it once."""

    def __init__(self, mode: str, precision: str, phase: Callable[[], int]) -> None:
        """`phase()` is the number of phases that are done."""
        self.strict, self.precision, self.phase = mode == "strict", precision, phase
        self.looked_at: dict[str, bool] = {}  # engines that began to train here: whether their gradients were checked
        self.warned: set[str] = set()

    def same_weights(self, largest_kl: float) -> None:
        """Before the first update the policy is its reference."""
        bound = 0.0 if device_settings().repeats_exactly else KL_BOUND_GPU[self.precision]
        self._expect(
            "kl_zero",
            largest_kl,
            largest_kl <= bound,
            f"KL to the reference is {largest_kl:.2e} before any update, not {bound:g}",
        )

    def drift(self, mean: float) -> None:
        """Generation and training mean the same by a log-prob."""
        bound = DRIFT_BOUND[self.precision]
        self._expect(
            "logprob_drift",
            mean,
            mean <= bound,
            f"log-probs as drawn and as recomputed differ by {mean:.2e} > {bound:g}",
        )

    def on_policy(self, ratio: float, clipped: float) -> None:
        """On the first minibatch of a phase the policy is still the one that was evaluated."""
        bound = RATIO_BOUND[self.precision]
        self._expect("ratio_one", ratio, abs(ratio - 1) <= bound, f"the first minibatch's ratio is {ratio:.7f}, not 1")
        # In bf16 the rounding of single tokens may pass a narrow clip.
        most = 0.0 if self.precision == "fp32" else CLIPPED_BOUND_BF16
        self._expect("nothing_clipped", clipped, clipped <= most, f"{clipped:.2%} of the first minibatch is clipped")

    def tokens(self, counted: float, expected: float) -> None:
        """Every response token is trained on once in an epoch, whichever ranks and microbatches it went to."""
        self._expect(
            "token_count", counted, counted == expected, f"an epoch counted {counted:g} response tokens of {expected:g}"
        )

    def gradients(self, engine: Engine, learns: bool, *, fresh: bool) -> None:
        """In an engine's first step that can learn, every tensor that trains has a gradient that is not 0.

        Args:
            learns: whether there is anything to learn from: a learning rate and a loss that are not 0.
            fresh: whether this is the first phase in which the engine trains.
        """
        if fresh:
            self.looked_at.setdefault(engine.name, False)
        if not learns or self.looked_at.get(engine.name, True):
            return
        self.looked_at[engine.name] = True
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
                f"{message} (ppo.invariants=warn would go on)",
                key=name,
                value=value,
                offers={"ppo.invariants": ["warn"]},
            )
        if name not in self.warned:
            self.warned.add(name)
            log.warning("%s", message)
