"""Rollouts as JSON-lines files with exact floats, so that any phase can be inspected or repeated without generation."""

import base64
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megarl.disk import UnreadableError, is_file, local, parse_object, read_text, write_atomically
from megarl.errors import ConfigError, DataError
from megarl.rollout.noise import EVALUATION, GREEDY, TRAINING
from megarl.rollout.requests import FINISH_REASONS, Request, Rollout

FORMAT = "megarl rollouts 1"
ROUTES = "routes"
_STREAMS = {TRAINING: "train", EVALUATION: "eval", GREEDY: "greedy"}


def phase_file(folder: str | Path, stream: int, phase: int, first: int = 0) -> Path:
    """Return the file of a phase of a random stream. Prompts that a phase adds, from number `first` on, have a file of
    their own."""
    name = _STREAMS.get(stream, f"stream{stream}")
    added = f"-from-{first:06d}" if first else ""
    return local(folder) / f"{name}-{phase:06d}{added}.jsonl"


def phase_of(name: str) -> int | None:
    """Return the phase in the name of such a file; None for any other file."""
    found = re.fullmatch(r"[a-z]+\d*-(\d{6,18})(?:-from-\d{6,18})?\.jsonl", name)
    return int(found[1]) if found else None


def dump(path: str | Path, rollouts: Iterable[Rollout]) -> None:
    """Write rollouts, all or nothing. Floats are written with enough digits to be read back exactly."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, as_lines(rollouts))
    except OSError as problem:
        raise DataError(
            f"rollouts {path} cannot be written ({problem}): set rollout.dump to a folder with free space, or to null",
            key="rollout.dump",
            where=path,
            offers={"rollout.dump": [None]},
        ) from None


def as_lines(rollouts: Iterable[Rollout]) -> list[str]:
    """Return the lines of a file with rollouts."""
    records = [_as_record(rollout) for rollout in rollouts]
    head = {"format": FORMAT, "rollouts": len(records)}
    return [json.dumps(record, allow_nan=False) + "\n" for record in (head, *records)]


def load(path: str | Path, remedy: str = "dump the rollouts again with rollout.dump") -> list[Rollout]:
    """Read what `dump` wrote. Refuse an incomplete file or one with other content; `remedy` ends the message."""
    path = Path(path)
    try:
        lines = read_text(path).splitlines()
    except UnreadableError as problem:
        raise DataError(f"{path} {problem}: {remedy}", where=path) from None
    head = _parsed(lines[0] if lines else "", path, 1, remedy)
    if head.get("format") != FORMAT:
        raise DataError(f"{path} has no rollouts in the format '{FORMAT}': {remedy}", where=path)
    if len(lines) - 1 != head.get("rollouts"):
        raise DataError(
            f"{path} is incomplete, with {len(lines) - 1} of {head.get('rollouts')} rollouts: {remedy}",
            key="rollouts",
            value=head.get("rollouts"),
            where=path,
        )
    names = {field.name for field in fields(Rollout)} - {ROUTES}
    rollouts = []
    for number, line in enumerate(lines[1:], 2):
        record = _parsed(line, path, number, remedy)
        routes = record.pop(ROUTES, None)
        if record.keys() != names or not _is_whole(record):
            raise DataError(f"{path}:{number} is not a complete rollout: {remedy}", where=f"{path}:{number}")
        rollout = Rollout(**record)
        if routes is not None:
            try:
                rollout = replace(rollout, routes=_routes(routes, len(rollout.tokens) - 1))
            except (TypeError, ValueError, KeyError):
                raise DataError(
                    f"{path}:{number} has {ROUTES} that do not belong to its tokens: {remedy}",
                    key=ROUTES,
                    where=f"{path}:{number}",
                ) from None
        rollouts.append(rollout)
    return rollouts


def replay(folder: str | Path, stream: int, phase: int, requests: Sequence[Request], first: int = 0) -> list[Rollout]:
    """Return the stored responses to these requests, in the order in which generation returns them. `first` is the
    number of the prompts that the phase had before."""
    path = phase_file(folder, stream, phase, first)
    if not is_file(path):
        raise ConfigError(
            f"rollout.replay={folder} has no {path.name}, which this phase needs: use a folder that rollout.dump "
            "filled in a run with the same prompts, or null to generate",
            key="rollout.replay",
            value=folder,
            where=path.name,
            offers={"rollout.replay": [None]},
        )
    stored = {(rollout.prompt_id, rollout.sample_id): rollout for rollout in load(path)}
    rollouts = []
    for request in sorted(requests, key=lambda request: (request.prompt_id, request.sample_id)):
        rollout = stored.get((request.prompt_id, request.sample_id))
        if rollout is None or tuple(rollout.prompt) != request.prompt:
            raise ConfigError(
                f"{path} has no response to prompt {request.prompt_id}, sample {request.sample_id}: rollout.replay "
                "needs the prompts, tokenizer and seed of the run that wrote the dump",
                key="rollout.replay",
                value=folder,
                where=path,
            )
        rollouts.append(rollout)
    return rollouts


def require_phases(folder: str | Path, phases: Mapping[int, Iterable[int]]) -> None:
    """Refuse a dump that lacks a phase.

    Args:
        folder: folder of the dump.
        phases: phases that the run will replay, by stream.
    """
    wanted = [phase_file(folder, stream, phase) for stream, numbers in phases.items() for phase in numbers]
    missing = [path.name for path in wanted if not path.is_file()]
    if missing:
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"rollout.replay={folder} has no {missing[0]}{others}, of {len(wanted)} files that this run needs: set "
            "trainer.max_phases and trainer.eval_every to what the dump has, or rollout.replay=null to generate",
            key="rollout.replay",
            value=folder,
            where=missing[0],
            offers={"rollout.replay": [None]},
        )


def _as_record(rollout: Rollout) -> dict[str, Any]:
    """Return a rollout as JSON values; routes that are not recorded are left out."""
    record = asdict(replace(rollout, routes=None))
    del record[ROUTES]
    if rollout.routes is not None:
        data = base64.b64encode(rollout.routes.astype("<i2").tobytes()).decode()
        record[ROUTES] = {"layers": rollout.routes.shape[1], "chosen": rollout.routes.shape[2], "int16": data}
    return record


def _routes(stored: Mapping[str, Any], tokens: int) -> NDArray[np.int16]:
    """Return the experts of `tokens` tokens from what `_as_record` wrote."""
    data = np.frombuffer(base64.b64decode(stored["int16"], validate=True), "<i2")
    return data.reshape(tokens, stored["layers"], stored["chosen"]).astype(np.int16)


def _parsed(line: str, path: Path, number: int, remedy: str) -> dict[str, Any]:
    try:
        return parse_object(line)
    except UnreadableError as problem:
        raise DataError(
            f"{path}:{number} is not a JSON object (it {problem}): {remedy}", where=f"{path}:{number}"
        ) from None


def _is_whole(record: Mapping[str, Any]) -> bool:
    """Return whether every field has the right type and the response can be trained on."""
    tokens, logprobs = [record["prompt"], record["response"]], record["logprobs"]
    return (
        all(isinstance(part, list) and part and all(map(_is_count, part)) for part in tokens)
        and isinstance(logprobs, list)
        and len(logprobs) == len(record["response"])
        and all(isinstance(value, int | float) and value <= 0 for value in logprobs)  # NaN is not
        and all(_is_count(record[name]) for name in ("prompt_id", "sample_id", "weights_version"))
        and record["finish_reason"] in FINISH_REASONS
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
