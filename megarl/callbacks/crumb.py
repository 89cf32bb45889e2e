"""What a process of a run last said of itself, and who is to blame when a run stands still. Reading needs no torch."""

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
BEAT_S = 5.0  # seconds between two signs of life of a process that is in good health
_BYTES = 1024


@dataclass
class Crumb:
    """One process's last words. Times are seconds since the epoch by its host's clock."""

    rank: int
    world: int
    host: str
    pid: int
    phase: str = ""  # the clock's part: train, eval, save, generate ...; "" between them
    step: int = 0
    since: float = 0.0  # when this phase of this step began
    alive: float = 0.0  # the last sign of life
    collective: str = ""  # the call of torch.distributed that it waits in
    at: str = ""  # the innermost line of code outside torch
    still: float = 0.0  # since when those two have not changed
    ended: str = ""  # finished, or what it failed of

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.host}, process {self.pid})"

    @property
    def where(self) -> str:
        return f"{self.phase or 'between phases'} of step {self.step}"


class CrumbFile:
    """A file that always holds one crumb: rewritten in place in one call, which costs microseconds."""

    def __init__(self, run_dir: Path, rank: int) -> None:
        folder = run_dir / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._file = os.open(folder / f"rank-{rank}.json", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def write(self, crumb: Crumb) -> None:
        plain = asdict(crumb)
        line = json.dumps(plain).encode()
        if len(line) >= _BYTES:  # a message of failure can be long
            line = json.dumps({**plain, "ended": crumb.ended[:200], "at": crumb.at[:200]}).encode()
        os.pwrite(self._file, line.ljust(_BYTES - 1) + b"\n", 0)

    def close(self) -> None:
        os.close(self._file)


def read(run_dir: Path) -> list[Crumb]:
    """The crumbs of a run, by rank. Those of an earlier, larger world are left out."""
    folder, crumbs = run_dir / FOLDER, []
    for path in sorted(folder.glob("rank-*.json")) if is_dir(folder) else ():
        try:
            found: dict[str, Any] = parse_object(read_text(path))
            crumb = Crumb(**{key: _shown(value) for key, value in found.items()})
            check_types(crumb)
        except (ConfigError, UnreadableError, TypeError):
            continue  # just being written, or of another version
        crumbs.append(crumb)
    if not crumbs:
        return []
    world = max(crumbs, key=lambda crumb: crumb.alive).world
    return sorted((crumb for crumb in crumbs if crumb.rank < world), key=lambda crumb: crumb.rank)


def _shown(value: Any) -> Any:
    return printable(value) if isinstance(value, str) else value


@dataclass(frozen=True)
class Verdict:
    """Which ranks hold up the others (none: nobody is seen to), and a sentence about it."""

    ranks: tuple[int, ...]
    sentence: str


def judge(crumbs: Sequence[Crumb], now: float, beat_s: float = BEAT_S) -> Verdict:
    """Who the others wait for: in this order, who failed, is silent, never came, is behind."""
    first = _failed(crumbs) or _silent(crumbs, beat_s) or _missing(crumbs)
    if first is not None:
        return first
    if all(crumb.ended for crumb in crumbs):
        return Verdict((), "the run has finished")
    newest = max(crumb.alive for crumb in crumbs)
    if now - newest > 3 * beat_s:
        return Verdict(
            (), f"no rank has given a sign of life for {now - newest:.0f} s: the job is over or its hosts are down"
        )
    moved = now - max(crumb.since for crumb in crumbs)
    if moved < 3 * beat_s:
        return Verdict((), f"the run moves: a rank went on to another phase {moved:.0f} s ago")
    return _behind(crumbs, now, beat_s)


def _failed(crumbs: Sequence[Crumb]) -> Verdict | None:
    failed = [crumb for crumb in crumbs if crumb.ended not in ("", "finished")]
    if not failed:
        return None
    first = min(failed, key=lambda crumb: crumb.alive)
    return Verdict((first.rank,), f"{first} failed first, in {first.where}: {first.ended}")


def _silent(crumbs: Sequence[Crumb], beat_s: float) -> Verdict | None:
    """Ranks that stopped beating while others went on. A rank that waits for others beats."""
    newest = max(crumb.alive for crumb in crumbs)
    silent = [crumb for crumb in crumbs if not crumb.ended and newest - crumb.alive > 3 * beat_s]
    if not silent:
        return None
    first = min(silent, key=lambda crumb: crumb.alive)
    return Verdict(
        tuple(crumb.rank for crumb in silent),
        f"{_names(silent)} gave no sign of life for {newest - first.alive:.0f} s (killed, stopped, or its host is "
        f"down), last in {first.where}; {_waiting(crumbs, silent)}",
    )


def _missing(crumbs: Sequence[Crumb]) -> Verdict | None:
    absent = sorted(set(range(crumbs[0].world)) - {crumb.rank for crumb in crumbs})
    if not absent:
        return None
    ranks = ", ".join(map(str, absent[:8])) + (" ..." if len(absent) > 8 else "")
    return Verdict(tuple(absent), f"rank {ranks} of {crumbs[0].world} never came up; the others wait for it to start")


def _behind(crumbs: Sequence[Crumb], now: float, beat_s: float) -> Verdict:
    """Ranks in another phase than those that went on, or at work where the others wait in a collective."""
    here = [crumb for crumb in crumbs if not crumb.ended]
    places = {(crumb.step, crumb.phase) for crumb in here}
    if len(places) > 1:
        begun = {place: min(c.since for c in here if (c.step, c.phase) == place) for place in places}
        last = min(places, key=lambda place: (place[0], begun[place]))
        late = [crumb for crumb in here if (crumb.step, crumb.phase) == last]
    else:
        late = [crumb for crumb in here if not crumb.collective]
        # At work in a long phase everybody is in and out of collectives; who waits is seen in the same one each time.
        if any(now - crumb.still < 3 * beat_s for crumb in here if crumb.collective):
            late = []
    if not late or len(late) == len(here):
        longest = max(now - crumb.since for crumb in here)
        return Verdict(
            (), f"all ranks are in {here[0].where}, for {longest:.0f} s at most: none is seen to hold up the others"
        )
    one = late[0]
    return Verdict(
        tuple(crumb.rank for crumb in late),
        f"{_names(late)} is in {one.where} for {now - one.since:.0f} s{f', at {one.at}' if one.at else ''}; "
        f"{_waiting(crumbs, late)}",
    )


def _waiting(crumbs: Sequence[Crumb], late: Sequence[Crumb]) -> str:
    others = [crumb for crumb in crumbs if crumb not in late and not crumb.ended]
    if not others:
        return "nobody else is left"
    calls = sorted({crumb.collective for crumb in others if crumb.collective})
    call = f", in {' and '.join(calls)}" if calls else ""
    return f"{len(others)} of {crumbs[0].world} ranks wait for it in {others[0].where}{call}"


def _names(crumbs: Sequence[Crumb]) -> str:
    more = f" and {len(crumbs) - 3} more" if len(crumbs) > 3 else ""
    return ", ".join(str(crumb) for crumb in crumbs[:3]) + more
