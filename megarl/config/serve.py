"""The configuration of `python -m megarl.serve_reward`."""

# ruff: noqa: RUF009 - `leaf` and `section` return dataclass fields

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from megarl.config.leaf import Section, leaf, section
from megarl.config.offers import Refusal, Rule
from megarl.config.sections.trainer import ProcessesConfig
from megarl.config.trees import Tree


@dataclass
class ServiceConfig(Section):
    """Where a reward model listens, and what it takes."""

    host: str = leaf(
        "127.0.0.1",
        "Address on which the server listens: 127.0.0.1 for this machine only, 0.0.0.0 for every network of this "
        "machine. The connection is not encrypted.",
    )
    port: int = leaf(
        8000,
        "Port on which the server listens (0: a free one, which is printed).",
        at_least=0,
        at_most=65535,
    )
    token_file: str | None = leaf(
        None,
        "File that holds a token in one line. Requests must send it as 'Authorization: Bearer TOKEN' (null: no token "
        "is needed).",
    )
    batch_size: int = leaf(
        32,
        "Maximum number of texts in a forward pass of one replica of the model.",
        at_least=1,
        at_most=2**20,
    )
    max_wait: float = leaf(
        0.005,
        "Seconds that a text waits for others before a smaller batch is scored.",
        at_least=0,
        at_most=60,
    )
    max_texts: int = leaf(
        1024, "Maximum number of texts in a request. More are refused with status 422.", at_least=1, at_most=2**20
    )
    max_tokens: int | None = leaf(
        None,
        "Maximum number of tokens of a prompt with its output. More are refused with status 422 (null: the context of "
        "the model). Before the server takes requests, it scores one batch of serve.batch_size texts of this length, "
        "so that a lack of memory appears at the start.",
        at_least=1,
    )
    max_request_bytes: int = leaf(
        4 * 2**20,
        "Maximum size of a request in bytes. More are refused with status 413 and not kept in memory.",
        at_least=1024,
        at_most=2**30,
    )
    max_requests: int = leaf(
        128,
        "Maximum number of requests that are read or answered at the same time. More are refused with status 503, and "
        "so are connections beyond twice this number and 16.",
        at_least=1,
        at_most=2**16,
    )
    max_open_bytes: int = leaf(
        64 * 2**20,
        "Maximum size in bytes of all requests together that are read or answered at the same time. What exceeds it is "
        "refused with status 503. The server needs several times as much memory. At least serve.max_request_bytes.",
        at_least=1024,
        at_most=2**40,
    )
    read_timeout: float = leaf(
        30.0,
        "Seconds in which the headers of a request must arrive, or the connection is closed; and then its content, or "
        "it is refused with status 408.",
        above=0,
        at_most=86400,
    )

    def check(self) -> None:
        """Require that the largest request fits."""
        if self.max_open_bytes < self.max_request_bytes:
            raise Refusal(
                f"serve.max_open_bytes={self.max_open_bytes} is less than serve.max_request_bytes="
                f"{self.max_request_bytes}, so that the largest request never fits",
                {
                    "serve.max_open_bytes": [self.max_request_bytes],
                    "serve.max_request_bytes": [self.max_open_bytes],
                },
                key="serve.max_open_bytes",
                value=self.max_open_bytes,
            )


def reward_model_is_named(config: Any, world_size: int) -> None:
    """Require a stored model."""
    if config.model.path is None:
        raise Refusal(
            "model.path is empty: name a reward model, such as a run folder of train_rm, for example "
            "model.path=runs/rm",
            key="model.path",
        )


@dataclass
class ServeConfig(Tree):
    """The keys of a reward model as a service."""

    rules: ClassVar[tuple[Rule, ...]] = (reward_model_is_named, *Tree.rules)

    serve: ServiceConfig = section(ServiceConfig)
    trainer: ProcessesConfig = section(ProcessesConfig)
