"""Continuous batching: which response is in which slot, computed identically on every rank of a replica.

Decisions depend only on lengths and tokens, never on timing, so ranks that see the same tokens decide the same.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarl.rollout.requests import Request, Rollout

Integers = NDArray[np.int64]
Move = tuple[int, int, int]  # from slot, to slot, cache entries
Decode = Callable[[Sequence[int]], str]


class Schedule:
    """The slots 0 ... n-1 of one group. The first `rows` are in use, so that a decoding step needs no gather.

    With an encoder-decoder, prompts are read whole by the encoder, each once for all slots that have it at that time,
    and a sequence is the start token and the response.

    A turn has two parts. First the prompts of `fresh` slots, all but their last token, are read into the cache. Then
    one decoding step gives every slot in use its next token; for a fresh slot its input is the last token of the
    prompt.

        slot      0        1        2        3
               running  running   fresh   unused      rows = 3

        prefill:  -        -     prompt[:-1]
        decode:   last     last  prompt[-1]           one step for all rows
    """

    def __init__(
        self,
        requests: Sequence[Request],
        slots: int,
        eos_id: int,
        weights_version: int = 0,
        decode: Decode | None = None,
        also_eos: Sequence[int] = (),
        start_id: int | None = None,
    ) -> None:
        """Fill the slots with the first requests.

        Args:
            also_eos: other tokens that end a response like EOS.
            start_id: start token of an encoder-decoder's sequences; None for other models.
        """
        self.start_id = start_id
        self.queue = deque(requests)
        self.eos_ids, self.weights_version, self._decode = (eos_id, *also_eos), weights_version, decode
        capacity = min(slots, len(requests))
        longest = max((request.sampling.max_new_tokens for request in requests), default=0)
        self.running: list[Request] = []
        self.fresh: list[int] = []
        self.retired: list[int] = []  # slots of the responses that the last `accept` finished
        self.finished: list[Rollout] = []
        self.decode_passes = self.decoded_rows = self.prefilled_tokens = 0
        # One entry per slot, as arrays, so that a turn costs few operations for any number of rows.
        self._tokens = np.zeros((capacity, longest), np.int64)
        self._logprobs = np.zeros((capacity, longest), np.float32)
        self._count = np.zeros(capacity, np.int64)  # number of sampled tokens
        self._limit = np.zeros(capacity, np.int64)
        self._length = np.zeros(capacity, np.int64)  # tokens of prompt and response
        self._last = np.zeros(capacity, np.int64)
        self._stops = np.zeros(capacity, np.bool_)
        while self.queue and len(self.running) < capacity:
            self.running.append(self.queue[0])
            self._start(len(self.running) - 1)

    @property
    def rows(self) -> int:
        """Number of slots in use."""
        return len(self.running)

    @property
    def done(self) -> bool:
        """Whether all requests are finished."""
        return not self.running

    @property
    def last_tokens(self) -> Integers:
        """[rows] input tokens of the next decoding step."""
        return self._last[: self.rows]

    @property
    def lengths(self) -> Integers:
        """[rows] number of tokens so far, which is the position of the next token."""
        return self._length[: self.rows]

    def prefill(self, budget: int, padding: int | None = None) -> Iterator[list[int]]:
        """Yield the fresh slots whose prompt must be read, in batches of at most `budget` padded tokens (or of one
        slot), of which at most `padding` are padding.

        They are sorted by length, so that a batch has little of it. Slots that share a prompt that is read already
        (`shared`) are left out.
        """
        chunk: list[int] = []
        read = 0  # tokens of the chunk's prompts
        unread = set(self.fresh) - self.shared().keys()
        for slot in sorted(unread, key=lambda slot: (len(self.to_read(slot)), slot)):
            length = len(self.to_read(slot))  # the longest so far, as they are sorted
            if length == 0:
                continue
            self.prefilled_tokens += length
            padded = (len(chunk) + 1) * length
            if chunk and (padded > budget or (padding is not None and padded - read - length > padding)):
                yield chunk
                chunk, read = [], 0
            chunk.append(slot)
            read += length
        if chunk:
            yield chunk

    def shared(self) -> dict[int, int]:
        """Return the fresh slots of an encoder-decoder whose prompt is not read once more, each with the slot that has
        it: that of a running response, or another fresh one. Of other models, every slot reads its prompt."""
        if self.start_id is None:
            return {}
        fresh, found = set(self.fresh), {}
        readers: dict[tuple[int, ...], int] = {}
        for slot in sorted(range(self.rows), key=fresh.__contains__):  # running responses come first
            reader = readers.setdefault(self.running[slot].prompt, slot)
            if slot in fresh and reader != slot:
                found[slot] = reader
        return found

    def to_read(self, slot: int) -> tuple[int, ...]:
        """Return the tokens of a fresh slot's prompt that are read before the first decoding step."""
        prompt = self.running[slot].prompt
        return prompt[:-1] if self.start_id is None else prompt

    def accept(self, tokens: Integers, logprobs: NDArray[np.float32]) -> list[Move]:
        """Add the sampled token [rows] of each slot, remove finished responses and refill their slots.

        Return the moves that the cache must make, in order.
        """
        rows = self.rows
        self.decode_passes += 1
        self.decoded_rows += rows
        slots = np.arange(rows)
        count = self._count[:rows]
        self._tokens[slots, count] = tokens
        self._logprobs[slots, count] = logprobs
        count += 1
        self._length[:rows] += 1
        self._last[:rows] = tokens
        self.fresh, self.retired = [], []
        ended = np.isin(tokens, self.eos_ids) | (count >= self._limit[:rows])
        for slot in np.flatnonzero(self._stops[:rows] & ~ended).tolist():
            ended[slot] = self._stopped(slot)
        holes: list[int] = np.flatnonzero(ended).tolist()
        if not holes:
            return []
        for slot in holes:
            self._retire(slot)
        refilled = min(len(holes), len(self.queue))
        for slot in holes[:refilled]:
            self._start(slot)
        return self._close_up(holes[refilled:])

    def end_soon(self) -> None:
        """Let every running response end with its next token, and start no other."""
        self.queue.clear()
        self._limit[: self.rows] = self._count[: self.rows] + 1

    def _start(self, slot: int) -> None:
        """Put the next request of the queue into a slot."""
        request = self.queue.popleft()
        self.running[slot] = request
        self.fresh.append(slot)
        self._count[slot] = 0
        self._limit[slot] = request.sampling.max_new_tokens
        if self.start_id is None:
            self._length[slot], self._last[slot] = len(request.prompt), request.prompt[-1]
        else:
            self._length[slot], self._last[slot] = 1, self.start_id
        self._stops[slot] = bool(request.sampling.stop or request.sampling.stop_text)

    def _close_up(self, holes: Sequence[int]) -> list[Move]:
        """Fill empty slots with the last slots in use, the highest empty slot first."""
        moves = []
        for hole in reversed(holes):
            last = self.rows - 1
            if hole != last:
                self.running[hole] = self.running[last]
                if last in self.fresh:
                    self.fresh[self.fresh.index(last)] = hole
                else:
                    moves.append((last, hole, int(self._length[last]) - 1))
                for column in self._columns():
                    column[hole] = column[last]
            self.running.pop()
        return moves

    def _columns(self) -> tuple[NDArray[Any], ...]:
        return self._tokens, self._logprobs, self._count, self._limit, self._length, self._last, self._stops

    def _stopped(self, slot: int) -> bool:
        """Return whether the response ends in a stop sequence or its text contains a stop text."""
        sampling, count = self.running[slot].sampling, int(self._count[slot])
        tail = self._tokens[slot, :count]
        for stop in sampling.stop:
            if len(stop) <= count and tuple(tail[-len(stop) :].tolist()) == stop:
                return True
        if not sampling.stop_text or self._decode is None:
            return False
        # A token is at least one byte, so this window contains all tokens of a stop text that has just ended. The 8
        # extra tokens are for characters that are split between tokens, and for special tokens, which have no text.
        window = max(len(text.encode()) for text in sampling.stop_text) + 8
        text = self._decode(tail[-window:].tolist())
        return any(stop in text for stop in sampling.stop_text)

    def _retire(self, slot: int) -> None:
        """Add the finished response with the first reason that applies, in the order eos, stop, length."""
        self.retired.append(slot)
        request, count = self.running[slot], int(self._count[slot])
        response = self._tokens[slot, :count].tolist()
        if response[-1] in self.eos_ids:
            reason = "eos"
        else:
            reason = "stop" if self._stops[slot] and self._stopped(slot) else "length"
        logprobs = self._logprobs[slot, :count].tolist()
        self.finished.append(
            Rollout(
                request.prompt_id,
                request.sample_id,
                list(request.prompt),
                response,
                logprobs,
                reason,
                self.weights_version,
            )
        )


def deal(requests: Sequence[Request], hands: int) -> list[list[Request]]:
    """Split requests into `hands` shares of similar expected work, the same on every rank.

    The longest requests are assigned first, each to the share with the least work. A share is sorted the same way, so
    that no long response starts last.
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
