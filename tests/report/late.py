"""An orchestrator that is late, as asynchronous generation is: a phase trains on the responses of the phase before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megarl.data.prompts import Prompt
from megarl.experience.collection import Scored
from megarl.experience.orchestrator import Orchestrator


class Late(Orchestrator):
    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self.waiting: Scored | None = None

    def respond(self, prompts: Sequence[Prompt], first: int) -> Scored:
        made = super().respond(prompts, first)
        late, self.waiting = self.waiting or made, made
        return late
