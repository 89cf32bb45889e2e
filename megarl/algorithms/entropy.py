"""Controllers of the weight of the entropy bonus."""

from megarl.algorithms.checks import check_range


class FixedEntropy:
    """A constant coefficient."""

    def __init__(self, coef: float) -> None:
        self.value = float(coef)

    def begin(self, entropy: float) -> None:
        """Do nothing: the coefficient is constant."""

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint, which is empty."""
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Do nothing: the coefficient is the configured one."""


class AdaptiveEntropy:
    """A coefficient that keeps the entropy from falling below a target (Skywork-OR1, arXiv 2505.22312).

    `value` is the coefficient of the present phase: 0 if it began above the target.

    Args:
        init: initial coefficient.
        target: entropy per token to keep.
        step: change of the coefficient per phase.
        maximum: largest coefficient.
    """

    def __init__(self, init: float, target: float, step: float, maximum: float) -> None:
        check_range("target", target, target > 0, "use an entropy above 0, or a fixed coefficient")
        check_range("step", step, step > 0, "use a step above 0")
        check_range("maximum", maximum, maximum > 0, "use a coefficient above 0")
        self.target, self.step, self.maximum = float(target), float(step), float(maximum)
        self.coef = min(float(init), self.maximum)
        self.value = 0.0

    def begin(self, entropy: float) -> None:
        """Set the coefficient of a phase whose policy has this entropy per token, and move it for the next phase."""
        below = entropy <= self.target
        self.value = self.coef if below else 0.0
        moved = self.coef + (self.step if below else -self.step)
        self.coef = min(max(moved, 0.0), self.maximum)

    def state_dict(self) -> dict[str, float]:
        """Return the state for a checkpoint."""
        return {"coef": self.coef}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore the state of a checkpoint."""
        self.coef = min(float(state.get("coef", self.coef)), self.maximum)
