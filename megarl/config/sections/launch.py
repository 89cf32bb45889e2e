"""What a run does when it is started with another number of processes than its layout was made for."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import Section, leaf


@dataclass
class LaunchConfig(Section):
    """What a run does when it is started with another number of processes than its layout was made for."""

    elastic: bool = leaf(
        False,
        "Where parallel.* or trainer.micro_batch_size does not divide over the processes that were started, take the "
        "nearest values that do, for this start only; a launcher leaves nodes idle that no such values can use. "
        "trainer.global_batch_size stays, and so do the numbers of the run. false: such a start is refused, with these "
        "values.",
    )
