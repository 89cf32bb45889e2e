"""Requests for responses, their sampling settings, and the rollouts that generation returns."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from megarl.config.sections.rollout import ResponsesConfig
from megarl.errors import ConfigError
from megarl.tokenizers import Tokenizer

FINISH_REASONS = ("eos", "stop", "length")


@dataclass(frozen=True)
class Sampling:
    """How the next token is sampled. The defaults sample from the model's distribution.

    Order: forbidden and allowed tokens, repetition penalty, temperature, then top-k, top-p and min-p (each applied to
    what the ones before it left), then the sample. Temperature 0 takes the most likely token.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    max_new_tokens: int = 128
    stop: tuple[tuple[int, ...], ...] = ()  # token sequences that end a response and stay in it
    stop_text: tuple[str, ...] = ()  # text that ends a response, wherever its tokens begin and end
    forbidden: tuple[int, ...] = ()
    allowed: tuple[int, ...] | None = None  # None: every token

    def __post_init__(self) -> None:
        for key, value, good, wants in (
            ("temperature", self.temperature, self.temperature >= 0, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "at least 1, or null for no limit"),
            ("top_p", self.top_p, self.top_p is None or 0 < self.top_p <= 1, "above 0 and at most 1, or null"),
            ("min_p", self.min_p, self.min_p is None or 0 <= self.min_p < 1, "from 0 to below 1, or null"),
            ("repetition_penalty", self.repetition_penalty, self.repetition_penalty > 0, "above 0"),
            ("max_new_tokens", self.max_new_tokens, self.max_new_tokens >= 1, "at least 1"),
            ("allowed", self.allowed, self.allowed is None or len(self.allowed) > 0, "at least one token, or null"),
        ):
            if not good:
                raise ConfigError(
                    f"rollout.{key}={value} is not a valid setting: use {wants}", key=f"rollout.{key}", value=value
                )
        if any(not sequence for sequence in self.stop):
            raise ConfigError(
                "rollout.stop has an empty sequence of tokens: remove it", key="rollout.stop", value=list(self.stop)
            )
        if "" in self.stop_text:
            raise ConfigError(
                "rollout.stop has an empty text, which would end every response: remove it",
                key="rollout.stop",
                value=list(self.stop_text),
            )
        if self.allowed is not None and set(self.allowed) <= set(self.forbidden):
            raise ConfigError(
                f"rollout.forbidden={list(self.forbidden)} leaves none of the allowed tokens: allow more",
                key="rollout.forbidden",
                value=list(self.forbidden),
            )


@dataclass(frozen=True)
class Request:
    """A request for one response. (prompt_id, sample_id) identifies it and seeds its randomness, in any batch."""

    prompt_id: int
    sample_id: int
    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ConfigError(
                f"prompt {self.prompt_id} has no tokens: remove it, or start it with the tokenizer's bos",
                key="prompt",
                value=self.prompt,
                where=f"prompt {self.prompt_id}",
            )


@dataclass
class Rollout:
    """A finished response. `logprobs` has one entry per token of `response`.

    `routes` are the experts that computed each token but the last, [tokens, layers with experts, chosen] int16, where
    they are recorded.
    """

    prompt_id: int
    sample_id: int
    prompt: list[int]
    response: list[int]
    logprobs: list[float]
    finish_reason: str
    weights_version: int = 0
    routes: NDArray[np.int16] | None = field(default=None, compare=False, repr=False)

    @property
    def tokens(self) -> list[int]:
        """Tokens of the prompt and the response."""
        return self.prompt + self.response

    @property
    def response_without_eos(self) -> list[int]:
        """Tokens of the response without its EOS."""
        return self.response[:-1] if self.finish_reason == "eos" else self.response


def text_without_end(rollout: Rollout, stop: Sequence[str], tokenizer: Tokenizer) -> str:
    """Return the text of a response without its EOS, or without the stop text that ended it."""
    text = tokenizer.decode(rollout.response_without_eos)
    return text[: _start_of_stop(rollout, stop, text)]


def tokens_without_end(rollout: Rollout, stop: Sequence[str], tokenizer: Tokenizer) -> list[int]:
    """Return the tokens of a response without its EOS, or without the stop text that ended it. Where a token has both
    the end of the text and the beginning of the stop text, the text is encoded anew."""
    response = rollout.response_without_eos
    text = tokenizer.decode(response) if rollout.finish_reason == "stop" else ""
    start = _start_of_stop(rollout, stop, text)
    if start is None:
        return response
    for count in range(len(response), -1, -1):
        kept = tokenizer.decode(response[:count])
        if kept == text[:start]:
            return response[:count]
        if len(kept) < start:
            break
    return tokenizer.encode(text[:start])


def _start_of_stop(rollout: Rollout, stop: Sequence[str], text: str) -> int | None:
    """Return the index in the response's text at which the stop text begins that ended it; None if none did."""
    if rollout.finish_reason != "stop":
        return None
    return min((text.find(one) for one in stop if one in text), default=None)


def sampling_from(rollout: ResponsesConfig) -> Sampling:
    """Convert the section `rollout` to sampling settings. A stop text is found wherever its tokens begin and end."""
    return Sampling(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        min_p=rollout.min_p,
        repetition_penalty=rollout.repetition_penalty,
        max_new_tokens=rollout.max_new_tokens,
        stop_text=tuple(rollout.stop),
    )


def repeat(prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, first: int = 0) -> list[Request]:
    """Return `n` requests for each prompt. prompt_id is the prompt's index plus `first`."""
    if n < 1:
        raise ConfigError(f"rollout.n={n} requests no responses: use 1 or more", key="rollout.n", value=n)
    return [
        Request(prompt_id, sample_id, tuple(prompt), sampling)
        for prompt_id, prompt in enumerate(prompts, first)
        for sample_id in range(n)
    ]


def check_requests(requests: Sequence[Request], vocab_size: int, max_positions: int, *, can_decode: bool) -> None:
    """Refuse requests that a model with this vocabulary and context cannot serve."""
    ids = {(request.prompt_id, request.sample_id) for request in requests}
    if len(ids) < len(requests):
        raise ConfigError(
            f"{len(requests)} requests share {len(ids)} pairs of prompt_id and sample_id, and those of a pair would "
            "get the same response: give them different numbers",
            key="prompt_id",
        )
    for request in requests:
        where = f"prompt {request.prompt_id}"
        length = len(request.prompt) + request.sampling.max_new_tokens
        if length > max_positions:
            raise ConfigError(
                f"{where} has {len(request.prompt)} tokens and rollout.max_new_tokens="
                f"{request.sampling.max_new_tokens}, but the model's context is {max_positions}: shorten one of them",
                key="rollout.max_new_tokens",
                value=request.sampling.max_new_tokens,
                where=where,
            )
        if min(request.prompt) < 0 or max(request.prompt) >= vocab_size:
            token = next(token for token in request.prompt if not 0 <= token < vocab_size)
            raise ConfigError(
                f"{where} has token {token}, but the model's vocabulary has {vocab_size} entries: "
                "tokenizer and model do not belong together",
                key="token",
                value=token,
                where=where,
            )
    for sampling in {id(request.sampling): request.sampling for request in requests}.values():
        if not _allows_some_token(sampling, vocab_size):
            raise ConfigError(
                f"rollout.allowed and rollout.forbidden leave none of the model's {vocab_size} tokens: allow more",
                key="rollout.allowed",
                value=sampling.allowed,
            )
        if sampling.stop_text and not can_decode:
            raise ConfigError(
                "a stop text needs the tokenizer: pass decode=tokenizer.decode to the Generator, or use stop tokens",
                key="decode",
            )


def _allows_some_token(sampling: Sampling, vocab_size: int) -> bool:
    forbidden = set(sampling.forbidden)
    if sampling.allowed is not None:
        return any(0 <= token < vocab_size and token not in forbidden for token in sampling.allowed)
    return len(forbidden) < vocab_size or any(token not in forbidden for token in range(vocab_size))
