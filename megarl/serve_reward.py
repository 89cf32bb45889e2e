"""`python -m megarl.serve_reward model.path=runs/rm`: a reward model as a service."""

from __future__ import annotations

import errno
import importlib.util
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import TYPE_CHECKING, Any

from megarl.command import INTERRUPTED, process_number
from megarl.config.compose import run
from megarl.config.files import no_score_head, require_score_head
from megarl.config.tokens import read_token
from megarl.config.world import local_devices
from megarl.errors import ConfigError, UnavailableError
from megarl.logging import get_logger

if TYPE_CHECKING:
    from megarl.config.serve import ServeConfig, ServiceConfig
    from megarl.experience.model_scorer import ModelScorer
    from megarl.parallel.grid import Grid
    from megarl.serving.server import Service

log = get_logger(__name__)
PACKAGES = ("fastapi", "uvicorn")
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_SAME_S = 1.0
"""Seconds within which a second signal counts as the first: a terminal sends Ctrl-C to every process of a command."""
_PATIENCE_S = 5.0


def serve(config: ServeConfig) -> int:
    """Serve in the processes that a launcher started, else in `trainer.devices` new ones. Return the exit code."""
    for package in PACKAGES:
        if importlib.util.find_spec(package) is None:
            raise UnavailableError(
                f"serve_reward needs {package}, which is not installed: pip install 'megarl[serve]'", key=package
            )
    assert config.model.path is not None
    require_score_head(config.model.path, "model.path")
    if process_number() == 0:
        bind(config.serve).close()  # refuse it before a model is loaded
    from megarl.parallel.processes import run_in_processes, set_env_from_slurm

    set_env_from_slurm()
    devices = 1 if "WORLD_SIZE" in os.environ else local_devices(config)
    if devices == 1:
        work(config)
        return 0
    import torch.multiprocessing.spawn  # noqa: F401 - it takes seconds, in which a signal still ends this process

    with _passed_on() as signals:
        code = run_in_processes(devices, work, config, started=signals.take)
    return INTERRUPTED if code < 0 and signals.arrived else code


def work(config: ServeConfig, ready: Callable[[int], None] = lambda port: None) -> None:
    """Load the model and serve until SIGTERM or Ctrl-C. The first process has the HTTP server.

    Args:
        ready: called in the first process with the port when requests are answered.
    """
    from megarl.logging import setup

    setup(None, rank=process_number(), debug=config.debug)
    with _stopping() as stop, open_scorer(config) as (grid, scorer):
        _serve(config, grid, scorer, stop, ready)


@contextmanager
def open_scorer(config: ServeConfig) -> Iterator[tuple[Grid, ModelScorer]]:
    """Yield the processes of the world, and the reward model on them."""
    from megarl.experience.model_scorer import ModelScorer
    from megarl.models.build import build_engine
    from megarl.models.exchange.pretrained import resolve_pretrained
    from megarl.models.roles import Role
    from megarl.parallel.grid import grid_of_world
    from megarl.tokenizers import tokenizer_of

    config, sources = resolve_pretrained(config)
    path = config.model.path
    source = sources.at(path)
    assert source is not None
    if source.has_output:
        raise no_score_head("model.path", str(path))
    tokenizer = tokenizer_of(config)
    with grid_of_world(config) as grid:
        engine = build_engine(
            Role("reward", config.model, source.vocab_size, ("score",), source=source),
            grid,
            config.parallel,
            precision=config.trainer.precision,
            seed=config.seed,
        )
        scorer = ModelScorer(engine, source, tokenizer, per_microbatch=config.serve.batch_size, key="model.path")
        sources.close()
        yield grid, scorer


def _serve(config: ServeConfig, grid: Grid, scorer: ModelScorer, stop: _Stop, ready: Callable[[int], None]) -> None:
    """Start the HTTP server in the first process, and score on all of them until a signal arrives."""
    from megarl.serving.server import follow, warm_up

    settings, longest = config.serve, scorer.reader.longest
    count, length = settings.batch_size * grid.layout.dp, min(longest, settings.max_tokens or longest)
    log.info("warm-up: a batch of %d texts of %d tokens (serve.batch_size, serve.max_tokens)", count, length)
    warm_up(scorer, count, length, scorer.reader.vocab_size)
    service: Service | None = None

    def start() -> None:
        nonlocal service
        service = _started(config, scorer, grid.layout.dp)
        where = f"http://{config.serve.host}:{service.port}"
        sys.stdout.write(f"reward model {config.model.path} ({scorer.fingerprint}) at {where}\n")
        sys.stdout.flush()

    grid.run_on_rank0(start)
    stop.close = (lambda: None) if service is None else service.batcher.close  # the first process tells the others
    try:
        if service is not None:
            ready(service.port)
        follow(grid, scorer, service, min(_PATIENCE_S, config.parallel.timeout_s / 4))
    finally:
        if service is not None:
            service.close()


def _started(config: ServeConfig, scorer: ModelScorer, replicas: int) -> Service:
    """Return the HTTP server of the first process, which takes requests from now on."""
    from megarl.serving.app import create_app
    from megarl.serving.batcher import Batcher
    from megarl.serving.counters import Counters
    from megarl.serving.server import HttpServer, Service

    settings = config.serve
    token = None if settings.token_file is None else read_token(settings.token_file, "serve.token_file")
    if token is None and not settings.host.startswith(("127.", "localhost", "::1")):
        log.warning(
            "serve.host=%s without serve.token_file: all who reach this machine can use the server", settings.host
        )
    batcher = Batcher(settings.batch_size * replicas, settings.max_wait)
    counters = Counters(lambda: batcher.waiting)
    app = create_app(scorer.reader, batcher, counters, fingerprint=scorer.fingerprint, settings=settings, token=token)
    http = HttpServer(app, bind(settings), settings)
    http.start()
    return Service(batcher, counters, http)


def bind(settings: ServiceConfig) -> socket.socket:
    """Return a socket that listens at the configured address."""
    host, port = settings.host, settings.port
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a server that has just ended leaves its port busy
        bound.bind(address)
        bound.listen(1024)
    except (OSError, UnicodeError) as problem:
        if bound is not None:
            bound.close()
        if isinstance(problem, UnicodeError | socket.gaierror) or problem.errno == errno.EADDRNOTAVAIL:
            raise ConfigError(
                f"serve.host={host} is not an address of this machine ({problem}): use 127.0.0.1, or 0.0.0.0 for all",
                key="serve.host",
                value=host,
                offers={"serve.host": ["127.0.0.1", "0.0.0.0"]},
            ) from None
        raise ConfigError(
            f"serve.port={port} on serve.host={host} cannot be listened on ({problem.strerror}): use another port, or "
            "serve.port=0 for a free one",
            key="serve.port",
            value=port,
            offers={"serve.port": [0]},
        ) from None
    return bound


# --- signals ----------------------------------------------------------------------------------------------------------


class _Stop:
    """What SIGTERM and Ctrl-C do: the first closes the queue, the second ends the process at once."""

    def __init__(self) -> None:
        self.close: Callable[[], None] | None = None  # None while the model is loaded
        self._first: float | None = None

    def __call__(self, number: int, frame: object) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if self._first is None and self.close is not None:
            self._first = now
            self.close()
        elif self._first is None or now > self._first + _SAME_S:
            os._exit(INTERRUPTED)


@contextmanager
def _stopping() -> Iterator[_Stop]:
    """Handle the signals inside the block."""
    stop = _Stop()
    with _handled(stop):
        yield stop


class _PassOn:
    """Passes signals on to the processes that this one starts, also one that arrives before all have started."""

    def __init__(self) -> None:
        self.arrived = False
        self._processes: Sequence[BaseProcess] = ()

    def __call__(self, number: int, frame: object) -> None:
        """Handle a signal."""
        self.arrived = True
        for process in self._processes:
            if process.is_alive():
                process.terminate()

    def take(self, processes: Sequence[BaseProcess]) -> None:
        """Take the processes, all of which have started."""
        self._processes = processes
        if self.arrived:
            self(signal.SIGTERM, None)


@contextmanager
def _passed_on() -> Iterator[_PassOn]:
    """Pass signals on inside the block."""
    signals = _PassOn()
    with _handled(signals):
        yield signals


@contextmanager
def _handled(handler: Callable[[int, Any], Any]) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)


def main() -> None:
    """Run the command."""
    run("serve_reward", sys.argv[1:], serve)


if __name__ == "__main__":
    main()
