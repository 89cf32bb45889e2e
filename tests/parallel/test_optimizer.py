"""A learning rate's schedule over a resume."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from megarl.config.sections.optim import OptimConfig
from megarl.parallel.optimizer import OptimSpec, build_schedule, restore_schedule


def schedule(total_steps: int, **settings: Any) -> Any:
    optimizer = SimpleNamespace(param_groups=[{"params": [], "lr": 0.0}])
    return build_schedule(optimizer, OptimSpec(OptimConfig(**settings), total_steps))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ((100, {}), (100, {}), None),
        ((100, {"schedule": "cosine"}), (200, {"schedule": "cosine"}), "lr_decay_steps 100 -> 200"),
        ((100, {"schedule": "constant"}), (200, {"schedule": "constant"}), None),
        ((100, {"lr": 1e-3}), (100, {"lr": 2e-3}), "max_lr 0.001 -> 0.002"),
    ],
    ids=["the same", "longer", "longer, constant", "another rate"],
)
def test_a_resume_with_another_schedule_goes_on_and_says_so(
    before: Any, after: Any, said: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    earlier, later = schedule(before[0], **before[1]), schedule(after[0], **after[1])
    earlier.step(30)
    with caplog.at_level(logging.WARNING):
        restore_schedule(later, earlier.state_dict(), "policy")
    assert later.num_steps == 30
    assert [said in record.message for record in caplog.records] == [True] if said else not caplog.records
    unbroken = schedule(after[0], **after[1])
    unbroken.step(30)
    assert later.optimizer.param_groups[0]["lr"] == unbroken.optimizer.param_groups[0]["lr"]
