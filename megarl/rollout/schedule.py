"""Which response is in which slot: continuous batching as plain bookkeeping, the same on every rank of a replica.

Decisions follow from lengths and tokens alone, never from timing, so ranks that see the same tokens agree.
"""

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from megarl.rollout.requests import Request, Rollout


@dataclass
class Running:
    """A response being drawn."""

    request: Request
    response: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.response)


@dataclass
class Plan:
    """The passes of one turn: prompts to be read into slots, and how many of the first slots decode a token."""

    prefill: list[int]  # slots whose prompt is read in this turn, shortest prompt first
    decode: list[int]  # slots that go on, in order; consecutive from 0


class Schedule:
    """Slots 0 ... n-1 of one group. Slots in use are kept consecutive, so that a decode pass needs no gather."""

    def __init__(self, requests: Iterable[Request], slots: int, eos_id: int, weights_version: int = 0) -> None:
        self.queue = deque(requests)
        self.slots = slots
        self.eos_id = eos_id
        self.weights_version = weights_version
        self.running: list[Running] = []
        self.finished: list[Rollout] = []
        self.new: list[int] = []
        self.decode_passes = 0
        self.decoded_rows = 0
        self._fill()

    @property
    def done(self) -> bool:
        return not self.running

    def plan(self) -> Plan:
        """What to run now. Every slot gets exactly one token out of it."""
        fresh = set(self.new)
        decode = [slot for slot in range(len(self.running)) if slot not in fresh]
        return Plan(sorted(self.new, key=lambda slot: (len(self.running[slot].request.prompt), slot)), decode)

    def accept(self, slots: Sequence[int], tokens: Sequence[int], logprobs: Sequence[float]) -> list[tuple[int, int, int]]:
        """Take the tokens drawn for `slots`; retire what is finished and refill.

        Returns the moves (from slot, to slot, entries) that the cache must copy, in order.
        """
        for slot, token, logprob in zip(slots, tokens, logprobs, strict=True):
            running = self.running[slot]
            running.response.append(token)
            running.logprobs.append(logprob)
        self.new = []
        moves = []
        ended = [slot for slot, running in enumerate(self.running) if self._reason(running) is not None]
        for slot in ended:
            self._retire(self.running[slot])
        free = deque(ended)
        while free and self.queue:
            slot = free.popleft()
            self.running[slot] = Running(self.queue.popleft())
            self.new.append(slot)
        for slot in sorted(free, reverse=True):  # the last slot in use moves into the hole
            last = len(self.running) - 1
            if slot != last:
                self.running[slot] = self.running[last]
                moves.append((last, slot, self.running[slot].length))
                self.new = [slot if fresh == last else fresh for fresh in self.new]
            self.running.pop()
        return moves

    def _fill(self) -> None:
        while self.queue and len(self.running) < self.slots:
            self.new.append(len(self.running))
            self.running.append(Running(self.queue.popleft()))

    def _reason(self, running: Running) -> str | None:
        """Why a response ends here, if it does. The first reason that holds, in this order."""
        response, sampling = running.response, running.request.sampling
        if response[-1] == self.eos_id:
            return "eos"
        if any(tuple(response[-len(stop) :]) == stop for stop in sampling.stop):
            return "stop"
        return "length" if len(response) >= sampling.max_new_tokens else None

    def _retire(self, running: Running) -> None:
        reason = self._reason(running)
        assert reason is not None
        request = running.request
        self.finished.append(
            Rollout(
                request.prompt_id,
                request.sample_id,
                list(request.prompt),
                running.response,
                running.logprobs,
                reason,
                self.weights_version,
            )
        )


def deal(requests: Sequence[Request], hands: int) -> list[list[Request]]:
    """Share requests out by expected work, the same on every rank: longest first, each to the lightest hand.

    Within a hand the longest come first too, so that no long response starts last.
    """

    def work(request: Request) -> int:
        return len(request.prompt) + request.sampling.max_new_tokens

    ordered = sorted(requests, key=lambda r: (-work(r), r.prompt_id, r.sample_id))
    shares: list[list[Request]] = [[] for _ in range(hands)]
    loads = [0] * hands
    for request in ordered:
        hand = loads.index(min(loads))
        shares[hand].append(request)
        loads[hand] += work(request)
    return shares
