"""`python -m megarl.generate model.path=... prompts=FILE`: responses to prompts as JSON lines, or a chat in the
terminal."""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from megarl.command import process_number
from megarl.config.compose import run
from megarl.config.files import SUFFIXES, data_suffix, load_chat_template
from megarl.config.world import local_devices
from megarl.disk import is_file, local, require_new, shown, why_missing, writable
from megarl.errors import ConfigError, DataError, MegarlError
from megarl.progress import choose_display, shows_bars, waiting_for_imports

if TYPE_CHECKING:
    from megarl.config.generate import GenerateConfig
    from megarl.data.prompts import Prompt
    from megarl.models.exchange.pretrained import Sources
    from megarl.parallel.grid import Grid
    from megarl.rollout.generator import Generator
    from megarl.rollout.requests import Request, Rollout
    from megarl.terminal_chat import Answer, Speaker, TerminalChat
    from megarl.tokenizers import Tokenizer


def generate(config: "GenerateConfig") -> int:
    """Generate in the processes that a launcher started, else in `trainer.devices` new ones. Return the exit code."""
    _check_paths(config)
    choose_display(config.trainer.progress)
    with waiting_for_imports():
        from megarl.parallel.processes import run_in_processes, set_env_from_slurm

    set_env_from_slurm()
    devices = 1 if "WORLD_SIZE" in os.environ else local_devices(config)
    if devices == 1:
        work(config)
        return 0
    if config.chat:
        raise ConfigError(
            f"chat=true with trainer.devices={devices}: processes started here cannot read the terminal, so use "
            f"torchrun --nproc-per-node={devices} -m megarl.generate --chat",
            key="chat",
            value=True,
        )
    return run_in_processes(devices, work, config)


def _check_paths(config: "GenerateConfig") -> None:
    """Refuse prompts that are not there and an output that is, before slow imports."""
    if config.out is not None:
        require_new(config.out, "out")
    if config.prompts is not None:
        prompts_file(config.prompts)


def work(config: "GenerateConfig") -> None:
    """Build the model and generate: a chat, or responses to prompts."""
    from megarl.logging import setup
    from megarl.run.owner import owned

    setup(None, rank=process_number(), debug=config.debug)
    choose_display(config.trainer.progress)
    config.chat_template = load_chat_template(config.chat_template, "chat_template")
    if config.out is not None:
        _check_out(config.out)
    dump = config.rollout.dump
    dump_lock = nullcontext() if dump is None else owned(local(dump), config.parallel.timeout_s, key="rollout.dump")
    with dump_lock, open_generator(config) as (generator, tokenizer, prompts):
        if config.chat:
            chat(config, generator, tokenizer)
        else:
            answer(config, generator, tokenizer, prompts)


def _check_out(out: str) -> None:
    """Refuse an output file that exists or cannot be written, before the ranks communicate, so that all refuse."""
    require_new(out, "out")
    path = writable(out, "out")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise ConfigError(
            f"out={path} cannot be written ({problem}): name another file", key="out", value=out, where=path
        ) from None


@dataclass
class _Resolved:
    """A model that is found and checked, but not built."""

    config: "GenerateConfig"
    sources: "Sources"
    tokenizer: "Tokenizer"
    vocab_size: int
    heads: tuple[str, ...]


def _resolved(config: "GenerateConfig") -> _Resolved:
    """Find the model of a configuration, with its shape and tokenizer."""
    from megarl.models.build import vocabulary
    from megarl.models.exchange.pretrained import resolve_pretrained
    from megarl.rollout.guided import policy_heads
    from megarl.tokenizers import tokenizer_of

    config, sources = resolve_pretrained(config)
    heads = policy_heads(sources.at(config.model.path))
    tokenizer = tokenizer_of(config)
    return _Resolved(config, sources, tokenizer, vocabulary(config.model, tokenizer), heads)


def _generator(resolved: _Resolved, grid: "Grid") -> "Generator":
    """Build a model on a grid, and return a generator with it."""
    from megarl.models.build import build_engine
    from megarl.models.roles import Role
    from megarl.rollout.generator import Generator, Limits
    from megarl.rollout.guided import scorer_for

    config, tokenizer = resolved.config, resolved.tokenizer
    settings = config.rollout.engine_settings
    source = resolved.sources.at(config.model.path)
    engine = build_engine(
        Role("policy", config.model, resolved.vocab_size, resolved.heads, source=source),
        grid,
        config.parallel,
        precision=config.trainer.precision,
        seed=config.seed,
    )
    return Generator(
        engine,
        tokenizer.eos_id,
        seed=config.seed,
        also_eos=tokenizer.stop_ids(config.chat_template)[1:],
        limits=Limits(settings.slots, settings.cache_bytes, graphs=settings.cuda_graphs),
        decode=tokenizer.decode,
        token_scorer=scorer_for(resolved.heads, config.rollout.ilql_beta),
    )


@contextmanager
def open_generator(
    config: "GenerateConfig",
) -> "Iterator[tuple[Generator, Tokenizer, list[Prompt]]]":
    """Yield a generator with the model on the processes of the world, its tokenizer, and the configured prompts."""
    from megarl.parallel.grid import grid_of_world

    settings = config.rollout.engine_settings
    if settings.layout is not None:
        raise ConfigError(
            f"rollout.engine.layout={settings.layout} applies only where weights are trained in another layout: set "
            "parallel.tp and parallel.pp instead",
            key="rollout.engine.layout",
            value=settings.layout,
        )
    resolved = _resolved(config)
    config, tokenizer = resolved.config, resolved.tokenizer
    prompts = [] if config.prompts is None else read_prompts(config, tokenizer, resolved.vocab_size)
    with grid_of_world(config) as grid:
        generator = _generator(resolved, grid)
        resolved.sources.close()
        yield generator, tokenizer, prompts
        generator.close()


# --- responses to prompts ---------------------------------------------------------------------------------------------


def read_prompts(config: "GenerateConfig", tokenizer: "Tokenizer", vocab_size: int) -> "list[Prompt]":
    """Return all prompts, tokenized. `prompts` is a file if it names one, else it is itself the prompt."""
    from megarl.data.formats import RecordFormat
    from megarl.data.prompts import PromptLimits, encode_prompt, fit_prompts
    from megarl.data.sources import Record, read_records

    assert config.prompts is not None
    records = (
        read_records([config.prompts], text_key=config.prompt_key, key="prompts")
        if prompts_file(config.prompts) is not None
        else [Record({config.prompt_key: config.prompts}, f"prompts={_start_of(config.prompts)!r}")]
    )
    record_format = RecordFormat(
        prompt_key=config.prompt_key,
        messages_key=config.messages_key,
        chat_template=config.chat_template,
        settable=("messages_key", "prompt_key"),
        section="",
    )
    encoded = (encode_prompt(record, tokenizer, record_format) for record in records)
    rollout = config.rollout
    limits = PromptLimits(config.model.max_positions, rollout.max_new_tokens, vocab_size, rollout.too_long)
    return fit_prompts(encoded, limits, f"prompts={_start_of(config.prompts)}")


def prompts_file(prompts: str) -> Path | None:
    """Return the file that `prompts` names, None if it is a text. Raise if there is no such file."""
    path = local(prompts)
    if is_file(path):
        return path
    if data_suffix(path) not in SUFFIXES:
        return None
    why = why_missing(path) or "is not a file"
    raise DataError(
        f"prompts={shown(prompts)}: {why} (looked from {Path.cwd()}); name a file, or a text",
        key="prompts",
        value=prompts,
    )


def _start_of(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:40]}..."


def answer(
    config: "GenerateConfig",
    generator: "Generator",
    tokenizer: "Tokenizer",
    prompts: "Sequence[Prompt]",
) -> None:
    """Write one line per response as soon as it is finished; those of other replicas are written at the end."""
    from megarl.rollout import stored
    from megarl.rollout.noise import EVALUATION
    from megarl.rollout.requests import Request, sampling_from

    sampling = sampling_from(config.rollout)
    # By number in the file, so that a prompt that is left out changes neither the others' ids nor their responses.
    by_number = {prompt.number: prompt for prompt in prompts}
    requests = [
        Request(prompt.number, sample_id, prompt.tokens, sampling)
        for prompt in prompts
        for sample_id in range(config.rollout.n)
    ]
    first = generator.grid.rank == 0
    written: set[tuple[int, int]] = set()
    start = time.monotonic()
    with _output(config.out if first else None, first) as out, _progress(config, len(requests), first) as advance:

        def write(rollouts: Sequence["Rollout"]) -> None:
            if out is None:
                return
            for rollout in rollouts:
                name = (rollout.prompt_id, rollout.sample_id)
                if name not in written:
                    line = _line(rollout, by_number[rollout.prompt_id].text, tokenizer)
                    out.write(json.dumps(line, allow_nan=False) + "\n")
                    written.add(name)
            out.flush()
            advance(rollouts)

        dump, replay = config.rollout.dump, config.rollout.replay
        if replay is not None:
            rollouts = stored.replay(replay, EVALUATION, 0, requests)
        else:
            rollouts = generator.generate(
                requests, stream=EVALUATION, on_finished=write, place=lambda number: by_number[number].where
            )
            if dump is not None:
                file = stored.phase_file(dump, EVALUATION, 0)
                generator.grid.run_on_rank0(lambda: stored.dump(file, rollouts))
        write([rollout for rollout in rollouts if (rollout.prompt_id, rollout.sample_id) not in written])
    if first:
        seconds, tokens = time.monotonic() - start, sum(len(rollout.response) for rollout in rollouts)
        where = f" to {config.out}" if config.out else ""
        sys.stderr.write(
            f"{len(rollouts)} responses, {tokens} tokens in {seconds:.1f} s: {tokens / seconds:,.0f} tokens/s{where}\n"
        )


def _line(rollout: "Rollout", prompt: str, tokenizer: "Tokenizer") -> dict[str, Any]:
    return {
        "prompt_id": rollout.prompt_id,
        "sample_id": rollout.sample_id,
        "prompt": prompt,
        "response": tokenizer.decode(rollout.response_without_eos),
        "finish_reason": rollout.finish_reason,
        "tokens": len(rollout.response),
        "token_ids": list(rollout.response),
        "logprob": sum(rollout.logprobs),
    }


@contextmanager
def _output(path: str | None, first: bool) -> Iterator[TextIO | None]:
    """Yield the file for the lines, or stdout; None on ranks other than the first."""
    if not first or path is None:
        yield sys.stdout if first else None
        return
    with local(path).open("w", encoding="utf-8") as file:
        yield file


@contextmanager
def _progress(config: "GenerateConfig", total: int, first: bool) -> Iterator[Callable[[Sequence["Rollout"]], None]]:
    """Yield a callback that shows progress: a bar with tokens per second on a terminal's stderr, else a line every few
    seconds."""
    kind = config.trainer.progress
    if kind == "auto":
        kind = "rich" if shows_bars(kind) and config.out else "plain"
    if not first or kind == "none":
        yield lambda rollouts: None
        return
    start, last = time.monotonic(), time.monotonic()
    done = tokens = 0
    if kind == "plain":

        def report(rollouts: Sequence["Rollout"]) -> None:
            nonlocal done, tokens, last
            done, tokens = done + len(rollouts), tokens + sum(len(rollout.response) for rollout in rollouts)
            if time.monotonic() - last > 5:
                last = time.monotonic()
                sys.stderr.write(f"{done}/{total} responses, {tokens / (last - start):,.0f} tokens/s\n")

        yield report
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total, rate="")

        def show(rollouts: Sequence["Rollout"]) -> None:
            nonlocal tokens
            tokens += sum(len(rollout.response) for rollout in rollouts)
            rate = f"{tokens / (time.monotonic() - start):,.0f} tokens/s"
            bar.update(task, advance=len(rollouts), rate=rate)

        yield show


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(config: "GenerateConfig", generator: "Generator", tokenizer: "Tokenizer") -> None:
    """Run a conversation. The first rank reads the terminal and shows the answers; all ranks compute them."""
    from megarl.terminal_chat import Answer, Open, TerminalChat, interrupts

    grid = generator.grid
    first = grid.rank == 0
    generators = [generator]
    speaker = _speaker(config, generator, tokenizer)
    speaker.conversation.system = config.system
    terminal = TerminalChat(speaker, config.rollout)
    steps = terminal.orders()
    result: Any = None
    try:
        while (order := grid.run_on_rank0(partial(_next_order, steps, result))) is not None:
            with interrupts(ignored=not first) as interrupted:
                try:
                    if isinstance(order, Answer):
                        result = _answer_turn(
                            order, generators[order.speaker], terminal if first else None, interrupted
                        )
                    elif isinstance(order, Open):
                        opened, its_tokenizer, other = open_second(config, order.path, grid)
                        generators.append(opened)
                        result = _speaker(other, opened, its_tokenizer)
                    else:
                        generators.pop().close()
                        result = None
                except MegarlError as error:
                    result = error
    finally:
        for opened in generators[1:]:
            opened.close()


def _next_order(steps: Any, result: Any) -> Any:
    """Hand the result of the last order to the terminal. Return its next order, None at the end of the chat."""
    try:
        return steps.send(result)
    except StopIteration:
        return None


def _answer_turn(
    order: "Answer", generator: "Generator", terminal: "TerminalChat | None", interrupted: Callable[[], bool]
) -> str:
    """Sample an answer and return its text. The terminal, on the first rank, shows every token and hears of Ctrl-C."""
    from megarl.rollout.noise import EVALUATION
    from megarl.rollout.requests import Request, sampling_from

    sampling = replace(sampling_from(order.settings), max_new_tokens=order.max_new_tokens)
    grid = generator.grid
    stopped = False

    def on_tokens(sampled: "list[tuple[Request, int]]") -> bool:
        nonlocal stopped
        if terminal is not None and not stopped:
            for _, token in sampled:
                terminal.take(token)
        # Only with one copy of the weights do all ranks call this, as the others have nothing to answer.
        stopped = stopped or (grid.layout.copies == 1 and grid.run_on_rank0(interrupted))
        return stopped

    request = Request(0, 0, order.tokens, sampling)
    (rollout,) = generator.generate([request], stream=EVALUATION, phase=order.turn, on_tokens=on_tokens)
    if terminal is None:
        return ""
    return terminal.finish(rollout.response_without_eos, stopped=stopped)


def open_second(config: "GenerateConfig", path: str, grid: "Grid") -> "tuple[Generator, Tokenizer, GenerateConfig]":
    """Return a generator with another model on the same processes, its tokenizer and its configuration."""
    from megarl.config.files import require_model, require_weights
    from megarl.config.sections.tokenizer import TokenizerConfig

    require_weights(path, "/compare")
    require_model(path, "/compare")
    other = replace(config, model=replace(config.model, path=path), tokenizer=TokenizerConfig(), prompts=None)
    resolved = _resolved(other)
    try:
        return _generator(resolved, grid), resolved.tokenizer, resolved.config
    finally:
        resolved.sources.close()


def _speaker(config: "GenerateConfig", generator: "Generator", tokenizer: "Tokenizer") -> "Speaker":
    from megarl.terminal_chat import Speaker

    return Speaker(
        config.model.path or "random weights",
        tokenizer,
        generator.config.max_positions,
        (generator.eos_id, *generator.also_eos),
        config.chat_template,
        config.plain,
    )


def main() -> None:
    """Run the command. `--chat` is short for chat=true, and `--system TEXT` for system=TEXT with any characters."""
    argv, system = _without_system(["chat=true" if word == "--chat" else word for word in sys.argv[1:]])
    run("generate", argv, lambda config: generate(config if system is None else replace(config, system=system)))


def _without_system(argv: list[str]) -> tuple[list[str], str | None]:
    """Return a command line without `--system TEXT` or `--system=TEXT`, and the text."""
    kept: list[str] = []
    system = None
    words = iter(argv)
    for word in words:
        if word == "--system":
            system = next(words, None)
            kept += [word] if system is None else []  # refused as an unknown flag
        elif word.startswith("--system="):
            system = word.removeprefix("--system=")
        else:
            kept.append(word)
    return kept, system


if __name__ == "__main__":
    main()
