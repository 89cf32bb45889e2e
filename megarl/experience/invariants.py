"""Invariants that every run must meet, checked while it runs. A violation is reported by the invariant's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megarl.errors import InvariantError
from megarl.logging import get_logger
from megarl.parallel.device import device_settings
from megarl.parallel.engine import Engine

RATIO_BOUND = {"fp32": 1e-5, "bf16": 5e-2}  # on |ratio - 1| before the first step; matrix products differ by shape
DRIFT_BOUND = {"fp32": 1e-3, "bf16": 5e-2}  # on the mean |sampled log-prob - recomputed log-prob|
KL_BOUND_GPU = {"fp32": 1e-4, "bf16": 5e-2}  # on a token's |policy - reference log-prob|; 0 on a CPU
CLIPPED_BOUND_BF16 = 0.05  # on the share of clipped tokens

MODE = "health.invariants"
Offers = Mapping[str, Sequence[Any]]

log = get_logger(__name__)


class Invariants:
    """Checks of a run. `mode` is what a violation does: `strict` stops the run, `warn` logs it once."""

    def __init__(
        self,
        mode: str,
        precision: str,
        phase: Callable[[], int],
        *,
        has_key: bool = True,
        corrected: bool = False,
    ) -> None:
        """
        Args:
            mode: strict or warn.
            precision: precision of the models.
            phase: returns the number of completed phases.
            has_key: whether the run has the key health.invariants, which messages then suggest.
            corrected: whether the loss corrects a difference between generation and training (ppo.correction), which is
                then not checked.
        """
        self.strict, self.precision, self.phase = mode == "strict", precision, phase
        self.has_key, self.corrected = has_key, corrected
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

    def arrived(self, source: Engine, copy: Engine, when: str, remedies: Offers | None = None) -> None:
        """Check that every tensor of a copy has the source's present values, by checksums of whole tensors.

        Args:
            source: the engine that trains.
            copy: an engine with the same tensors, or some of them, in the same layout or another.
            when: the phase, for the message.
            remedies: values that avoid the copy, by key.
        """
        sent, present = source.digests_of_copies(), copy.digests_of_copies()
        missed = [name for name, copies in present.items() if not set(copies) <= set(sent.get(name, ()))]
        self._expect(
            "weights_arrived",
            missed,
            not missed,
            f"{_first(missed)} of {copy.name} at {copy.grid.layout} differs from the present weights of {source.name} "
            f"at {source.grid.layout}: they were not copied, or damaged; resume from the last checkpoint",
            when=when,
            remedies=remedies,
        )

    def drift(
        self,
        mean: float,
        what: str = "sampled and recomputed log-probs",
        *,
        when: str | None = None,
        remedies: Offers | None = None,
        slack: float = 1.0,
    ) -> None:
        """Check that generation and training compute the same log-probs, unless the loss corrects their difference.

        Args:
            mean: mean absolute difference.
            what: the log-probs that were compared, for the message.
            when: the phase, for the message; None: the present one.
            remedies: values that avoid the difference, by key.
            slack: multiplies the bound, for a mean over a few tokens.
        """
        bound = DRIFT_BOUND[self.precision] * slack
        self._expect(
            "logprob_drift",
            mean,
            self.corrected or mean <= bound,
            f"{what} differ by {mean:.2e} > {bound:g}",
            when=when,
            remedies=remedies,
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
        self._expect("gradients", missed, not missed, f"no gradient has reached {_first(missed)} of {engine.name}")

    def _expect(
        self,
        name: str,
        value: object,
        holds: bool,
        problem: str,
        *,
        when: str | None = None,
        remedies: Offers | None = None,
    ) -> None:
        if holds:
            return
        message = f"invariant {name} is broken {when or f'in phase {self.phase() + 1}'}: {problem}"
        if self.strict:
            offers = dict(remedies or {})
            advice = [f"{key}={'null' if values[0] is None else values[0]} avoids it" for key, values in offers.items()]
            if self.has_key:
                offers[MODE] = ["warn"]
                advice.append(f"{MODE}=warn logs it and continues")
            line = f"{message} ({'; '.join(advice)})" if advice else message
            raise InvariantError(line, key=name, value=value, offers=offers)
        if name not in self.warned:
            self.warned.add(name)
            log.warning("%s", message)


def _first(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
