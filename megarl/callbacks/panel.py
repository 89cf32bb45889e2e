"""The panel of a run as lines of text, for a terminal or a notebook of any width."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from rich.cells import cell_len, chop_cells
from rich.text import Text

from megarl.callbacks.run_progress import FORMATS, PEAK_MEMORY, RunProgress, Shown, duration
from megarl.command import printable

_SPARE = 2
"""Columns that stay free, for the ^C that a terminal writes behind the last line."""
_LONGEST = 2000  # characters of a text that are looked at; more do not fit
_SHORTEST_BAR = 6
_BLOCKS = "▁▂▃▄▅▆▇█"
_MARKS = "_.:-=+*#"


@dataclass(frozen=True)
class Paper:
    """What the panel is written on.

    Attributes:
        width: number of columns.
        height: number of lines.
        encoding: encoding of the terminal; with another than UTF-8, bars and curves are of ASCII characters.
    """

    width: int
    height: int
    encoding: str = "utf-8"

    @property
    def columns(self) -> int:
        """Number of columns that the panel uses."""
        return max(self.width - _SPARE, 1)

    @property
    def ascii(self) -> bool:
        """Whether only ASCII characters are used."""
        return not self.encoding.lower().startswith("utf")

    @property
    def ellipsis(self) -> str:
        """What stands for text that is left out."""
        return "..." if self.ascii else "…"

    def clean(self, text: str) -> str:
        """Return text on one line, which neither controls the terminal nor lacks a character of its encoding."""
        line = " ".join(printable(text[:_LONGEST]).split())
        return line.encode(self.encoding, "backslashreplace").decode(self.encoding)


def panel(progress: RunProgress, paper: Paper) -> list[Text]:
    """Return the lines of the panel. None is wider than the paper, and they fit its height; the sample is left out
    first."""
    lines = [
        _bar(progress, paper),
        *_styled(_sections(progress, paper), "bold" if progress.section else ""),
        *_headline(progress, paper),
        *_styled(_metrics(progress, paper)),
        *_styled(_evaluation(progress, paper)),
    ]
    if progress.headline is None and progress.took_s is None:
        lines.append(_text(cut(f"waiting for the first {progress.unit}", paper.columns, paper.ellipsis)))
    sample = list(_styled(_sample(progress.sample, paper), "dim")) if progress.sample is not None else []
    fits = len(lines) + len(sample) < paper.height
    return [*lines, *sample] if fits else lines[: max(paper.height - 1, 1)]


def sparkline(values: Sequence[float], *, ascii_only: bool) -> str:
    """Return a character per value, from the lowest to the highest; `?` for NaN and infinity."""
    levels = _MARKS if ascii_only else _BLOCKS
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    flat = not high > low

    def level(value: float) -> str:
        if not math.isfinite(value):
            return "?"
        # Divided first, as the difference of two large numbers may be infinite.
        share = 0.5 if flat else (value / 2 - low / 2) / (high / 2 - low / 2)
        return levels[min(int(share * len(levels)), len(levels) - 1)]

    return "".join(map(level, values))


def flow(items: Iterable[str], columns: int, ellipsis: str, *, most: int | None = None) -> list[str]:
    """Return items as lines of at most this width, without cutting an item that fits a line.

    Args:
        items: what the lines hold, separated by two spaces.
        columns: width of a line.
        ellipsis: what stands for text that is left out.
        most: maximum number of lines (None: no maximum).
    """
    lines: list[str] = []
    for item in items:
        if lines and cell_len(lines[-1]) + 2 + cell_len(item) <= columns:
            lines[-1] += f"  {item}"
        else:
            lines.append(cut(item, columns, ellipsis))
    if most is not None and len(lines) > most:
        lines[most - 1 :] = [broken_off(lines[most - 1], columns, ellipsis)]
    return lines


def cut(text: str, columns: int, ellipsis: str) -> str:
    """Return text that is at most this wide."""
    return text if cell_len(text) <= columns else broken_off(text, columns, ellipsis)


def broken_off(text: str, columns: int, ellipsis: str) -> str:
    """Return text with an ellipsis behind it, both together at most this wide."""
    room = columns - len(ellipsis)
    if room < 2:  # an East Asian character is two columns wide
        return ellipsis[:columns]
    return (text if cell_len(text) <= room else chop_cells(text, room)[0]) + ellipsis


def _bar(progress: RunProgress, paper: Paper) -> Text:
    """Return the line with the step, a bar, and the remaining time or, at the end, the time that the run took."""
    left, right = progress.steps, ""
    if progress.took_s is not None:
        right = f"took {duration(progress.took_s)}"
    elif progress.eta_s is not None:
        right = f"eta {duration(progress.eta_s)}"
    room = paper.columns - len(left) - len(right) - 2 - 2 * bool(right)
    if progress.total is None or room < _SHORTEST_BAR:
        return _text(cut(f"{left}  {right}".rstrip(), paper.columns, paper.ellipsis), "bold")
    share = min(progress.step / progress.total, 1.0) if progress.total > 0 else 1.0
    done = int(room * share)
    full, empty = ("#", "-") if paper.ascii else ("━", "─")
    line = _text(f"{left}  ", "bold")
    line.append(full * done, "green" if share >= 1 else "cyan")
    line.append(empty * (room - done), "dim")
    line.append(f"  {right}" if right else "")
    return line


def _sections(progress: RunProgress, paper: Paper) -> list[str]:
    """Return what runs now, and the seconds of each section in the last step."""
    items = [f"now: {progress.section}"] if progress.section else []
    if progress.seconds:
        items += [f"last {progress.unit}:", *(f"{name} {_seconds(s)}" for name, s in progress.seconds.items())]
    return flow(map(paper.clean, items), paper.columns, paper.ellipsis)


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.0f}s" if seconds < 600 else duration(seconds)


def _headline(progress: RunProgress, paper: Paper) -> list[Text]:
    """Return the line with the score, or the loss where there is none, its trend, and the range of that."""
    name = progress.headline
    if name is None:
        return []
    said = FORMATS[name](progress.metrics[name])
    line = _text(cut(said, paper.columns, paper.ellipsis), "bold")
    room = paper.columns - len(said) - 2
    if len(progress.trend) < 2 or room < 2:
        return [line]
    curve = sparkline(list(progress.trend)[-room:], ascii_only=paper.ascii)
    line.append(f"  {curve}", "cyan")
    finite = [value for value in progress.trend if math.isfinite(value)]
    span = f"  {min(finite):.4g} to {max(finite):.4g}" if finite else ""
    if len(curve) == len(progress.trend) and len(curve) + len(span) <= room:
        line.append(span, "dim")
    return [line]


def _metrics(progress: RunProgress, paper: Paper) -> list[str]:
    metrics = progress.metrics
    items = [show(metrics[name]) for name, show in FORMATS.items() if name in metrics and name != progress.headline]
    if progress.memory_gb is not None:
        peak = f" (peak {metrics[PEAK_MEMORY]:.2f})" if PEAK_MEMORY in metrics else ""
        items.append(f"memory {progress.memory_gb:.2f} GB{peak}")
    return flow(items, paper.columns, paper.ellipsis)


def _evaluation(progress: RunProgress, paper: Paper) -> list[str]:
    items = progress.evaluated()
    if not items:
        return []
    return flow(map(paper.clean, ["last evaluation:", *items]), paper.columns, paper.ellipsis, most=2)


def _sample(sample: Shown | None, paper: Paper) -> list[str]:
    """Return a prompt and its response, cut to two lines each."""
    if sample is None:
        return []
    score = "" if sample.score is None else f"  score {sample.score:.4g}"
    lines = [cut(f"{sample.origin}{score}", paper.columns, paper.ellipsis)]
    for label, text in (("prompt    ", sample.prompt), ("response  ", sample.response)):
        room = max(paper.columns - len(label), 2)
        pieces = list(islice(chop_cells(paper.clean(text), room), 3)) or [""]
        if len(pieces) > 2 or len(text) > _LONGEST:
            pieces[1:] = [broken_off("".join(pieces[1:2]), room, paper.ellipsis)]
        lines += [
            cut((label if number == 0 else " " * len(label)) + piece, paper.columns, paper.ellipsis).rstrip()
            for number, piece in enumerate(pieces)
        ]
    return lines


def _styled(lines: Iterable[str], style: str = "") -> Iterable[Text]:
    return (_text(line, style) for line in lines)


def _text(line: str, style: str = "") -> Text:
    return Text(no_wrap=True, overflow="crop").append(line, style)
