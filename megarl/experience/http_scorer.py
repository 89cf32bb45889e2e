"""A scorer that asks reward servers (`megarl.serve_reward`) over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megarl.config.sections.reward import RewardConfig
from megarl.config.tokens import token_of_client
from megarl.data.prompts import Prompt
from megarl.experience.journal import Journal
from megarl.experience.reward_request import Entry
from megarl.experience.reward_servers import RewardServers
from megarl.experience.scorers import Answered, JournalledScorer
from megarl.parallel.grid import Grid
from megarl.rewards.scores import Scores
from megarl.rollout.requests import Rollout, text_without_end
from megarl.tokenizers import Tokenizer

LARGEST_CALL = 256
"""Maximum number of responses in a call without reward.calls.batch_size."""


class HttpScorer(JournalledScorer):
    """Scores rollouts with the reward model of one or several servers. Rank 0 asks them.

    Prompts and responses are sent as text, and the server encodes them with the tokenizer of its model.
    """

    name = "reward_server"

    def __init__(
        self,
        settings: RewardConfig,
        urls: Sequence[str],
        tokenizer: Tokenizer,
        grid: Grid,
        *,
        key: str = "reward.url",
        journal: Journal | None = None,
        stop: Sequence[str] = (),
    ) -> None:
        """Ask every server which model it has.

        Args:
            settings: how servers are called.
            urls: the servers.
            tokenizer: the policy's.
            grid: the processes of the run.
            key: the configuration key that names the servers, for messages.
            journal: keeps scores across restarts, for the present model.
            stop: texts that end a response, which the reward model does not read.
        """
        super().__init__(tokenizer, grid, settings, journal)
        self.settings, self.urls, self.key, self.stop = settings, urls, key, stop
        self.servers: RewardServers | None = None
        model = self._from_rank0(self._connect())
        # Another stop text cuts responses elsewhere, so that they are other texts.
        self._identify(f"{model} {list(stop)}" if stop else model)

    def close(self) -> None:
        """End the calls under way."""
        if self.servers is not None:
            self.servers.close()

    def _connect(self) -> Iterator[str | None]:
        calls = self.settings.call_settings
        self.servers = RewardServers(
            self.urls,
            token=token_of_client(),
            timeout_s=calls.timeout,
            retries=calls.retries,
            drops=self.drops,
            key=self.key,
        )
        yield from self.servers.connect()

    def _score(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> Iterator[Answered | None]:
        """Send the rollouts, `reward.calls.batch_size` in a call; without it, the same number to every server, but not
        more than `LARGEST_CALL` in a call."""
        assert self.servers is not None
        entries = [
            Entry(
                row,
                list(prompt.messages) if prompt.messages else prompt.text,
                text_without_end(rollout, self.stop, self.tokenizer),
                prompt.where,
            )
            for row, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
        ]
        size = self.batch_size or min(-(-len(entries) // len(self.servers.servers)), LARGEST_CALL)
        calls = []
        for talks in (False, True):
            alike = [entry for entry in entries if isinstance(entry.prompt, str) != talks]
            calls += [alike[first : first + size] for first in range(0, len(alike), size)]
        for outcome in self.servers.score(calls):
            if outcome is None:
                yield None
                continue
            scores = Scores([*outcome.scores], failed_calls=outcome.failed, repeated_calls=outcome.repeated)
            yield outcome.rows, scores
