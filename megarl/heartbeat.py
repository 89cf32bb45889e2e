"""Heartbeats of a run's processes, and a diagnosis of which rank blocks a stalled run. Reading needs no torch."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megarl.command import printable
from megarl.config.values import check_types
from megarl.disk import UnreadableError, is_dir, parse_object, read_text
from megarl.errors import ConfigError

FOLDER = "breadcrumbs"
BEAT_S = 5.0  # seconds between two heartbeats of a healthy process
_BYTES = 1024


@dataclass
class Heartbeat:
    """Heartbeat of one process. Times are seconds since the epoch by its host's clock."""

    rank: int
    world: int
    host: str
    pid: int
    phase: str = ""  # section of the clock: train, eval, save, generate ...; "" between sections
    step: int = 0
    since: float = 0.0  # when this phase of this step began
    alive: float = 0.0  # the last heartbeat
    collective: str = ""  # the function of torch.distributed in which it waits
    at: str = ""  # the innermost line of code outside torch
    still: float = 0.0  # when `collective` or `at` last changed
    ended: str = ""  # "finished", or the error

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        """Phase and step of the process, for messages."""
        return f"{self.phase or 'between phases'} of step {self.step}"


class HeartbeatFile:
    """A file with one heartbeat, which is overwritten in one call that costs microseconds."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank-{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, heartbeat: Heartbeat) -> None:
        """Overwrite the file with a heartbeat, in one call."""
        plain = asdict(heartbeat)
        line = json.dumps(plain).encode()
        if len(line) >= _BYTES:  # an error message can be long
            line = json.dumps({**plain, "ended": heartbeat.ended[:200], "at": heartbeat.at[:200]}).encode()
        os.pwrite(self._file, line.ljust(_BYTES - 1) + b"\n", 0)

    def close(self) -> None:
        """Close the file; the last heartbeat stays in it."""
        os.close(self._file)


MOST_PROCESSES = 2**20
"""Maximum number of processes of a world; a heartbeat that says more is damaged."""


def read(run_dir: Path) -> list[Heartbeat]:
    """Read the heartbeats of a run, by rank; those of an earlier, larger world are ignored."""
    folder, heartbeats = run_dir / FOLDER, []
    for path in sorted(folder.glob("rank-*.json")) if is_dir(folder) else ():
        try:
            found: dict[str, Any] = parse_object(read_text(path))
            heartbeat = Heartbeat(**{key: _shown(value) for key, value in found.items()})
            check_types(heartbeat)
        except (ConfigError, UnreadableError, TypeError):
            continue  # being written, or of another version
        if 0 <= heartbeat.rank < heartbeat.world <= MOST_PROCESSES:
            heartbeats.append(heartbeat)
    if not heartbeats:
        return []
    world = max(heartbeats, key=lambda heartbeat: heartbeat.alive).world
    return sorted(
        (heartbeat for heartbeat in heartbeats if heartbeat.rank < world), key=lambda heartbeat: heartbeat.rank
    )


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Verdict:
    """The ranks that block the others (empty if none is found), and a sentence that explains it."""

    ranks: tuple[int, ...]
    sentence: str


def diagnose(heartbeats: Sequence[Heartbeat], now: float, beat_s: float = BEAT_S) -> Verdict:
    """Find the ranks that the others wait for: in order, failed, silent, missing or behind."""
    first = _failed(heartbeats) or _silent(heartbeats, beat_s) or _missing(heartbeats)
    if first is not None:
        return first
    if all(heartbeat.ended for heartbeat in heartbeats):
        return Verdict((), "the run has finished")
    newest = max(heartbeat.alive for heartbeat in heartbeats)
    if now - newest > 3 * beat_s:
        return Verdict(
            (), f"no rank has written a heartbeat for {now - newest:.0f} s: the job is over or its hosts are down"
        )
    moved = now - max(heartbeat.since for heartbeat in heartbeats)
    if moved < 3 * beat_s:
        return Verdict((), f"the run makes progress: a rank entered another phase {moved:.0f} s ago")
    return _behind(heartbeats, now, beat_s)


def _failed(heartbeats: Sequence[Heartbeat]) -> Verdict | None:
    failed = [heartbeat for heartbeat in heartbeats if heartbeat.ended not in ("", "finished")]
    if not failed:
        return None
    first = min(failed, key=lambda heartbeat: heartbeat.alive)
    return Verdict((first.rank,), f"{first} failed first, in {first.where}: {first.ended}")


def _silent(heartbeats: Sequence[Heartbeat], beat_s: float) -> Verdict | None:
    """Find ranks whose heartbeat stopped while others continued. A rank that waits for others still writes it."""
    newest = max(heartbeat.alive for heartbeat in heartbeats)
    silent = [heartbeat for heartbeat in heartbeats if not heartbeat.ended and newest - heartbeat.alive > 3 * beat_s]
    if not silent:
        return None
    first = min(silent, key=lambda heartbeat: heartbeat.alive)
    return Verdict(
        tuple(heartbeat.rank for heartbeat in silent),
        f"{_names(silent)} wrote no heartbeat for {newest - first.alive:.0f} s (killed, stopped, or its host is "
        f"down), last in {first.where}; {_waiting(heartbeats, silent)}",
    )


def _missing(heartbeats: Sequence[Heartbeat]) -> Verdict | None:
    absent = sorted(set(range(heartbeats[0].world)) - {heartbeat.rank for heartbeat in heartbeats})
    if not absent:
        return None
    ranks = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
    return Verdict(tuple(absent), f"rank {ranks} of {heartbeats[0].world} never started; the others wait for it")


def _behind(heartbeats: Sequence[Heartbeat], now: float, beat_s: float) -> Verdict:
    """Find ranks that are not in the latest phase, or that compute while the others wait in a collective."""
    here = [heartbeat for heartbeat in heartbeats if not heartbeat.ended]
    places = {(heartbeat.step, heartbeat.phase) for heartbeat in here}
    if len(places) > 1:
        begun = {place: min(c.since for c in here if (c.step, c.phase) == place) for place in places}
        last = min(places, key=lambda place: (place[0], begun[place]))
        late = [heartbeat for heartbeat in here if (heartbeat.step, heartbeat.phase) == last]
    else:
        late = [heartbeat for heartbeat in here if not heartbeat.collective]
        # Ranks that work enter and leave collectives; a rank that waits is in the same one at every heartbeat.
        if any(now - heartbeat.still < 3 * beat_s for heartbeat in here if heartbeat.collective):
            late = []
    if not late or len(late) == len(here):
        longest = max(now - heartbeat.since for heartbeat in here)
        return Verdict(
            (), f"all ranks are in {here[0].where}, for {longest:.0f} s at most: none is found to block the others"
        )
    one = late[0]
    return Verdict(
        tuple(heartbeat.rank for heartbeat in late),
        f"{_names(late)} is in {one.where} for {now - one.since:.0f} s{f', at {one.at}' if one.at else ''}; "
        f"{_waiting(heartbeats, late)}",
    )


def _waiting(heartbeats: Sequence[Heartbeat], late: Sequence[Heartbeat]) -> str:
    others = [heartbeat for heartbeat in heartbeats if heartbeat not in late and not heartbeat.ended]
    if not others:
        return "no other rank is running"
    calls = sorted({heartbeat.collective for heartbeat in others if heartbeat.collective})
    call = f", in {' and '.join(calls)}" if calls else ""
    return f"{len(others)} of {heartbeats[0].world} ranks wait for it in {others[0].where}{call}"


def _names(heartbeats: Sequence[Heartbeat]) -> str:
    more = f" and {len(heartbeats) - 3} more" if len(heartbeats) > 3 else ""
    return ", ".join(str(heartbeat) for heartbeat in heartbeats[:3]) + more
