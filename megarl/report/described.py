"""What ran: the algorithm, model, layout, versions and times of a run, and its configuration beside the defaults."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from megarl.report.data import RunData, as_number
from megarl.report.markup import NOTHING, escape, facts, flat, folded, number, seconds, setting, table

_MISSING = object()
_OWN_KEYS = ("run.dir", "run.name")  # different in every run


def about(run: RunData) -> list[tuple[str, str]]:
    """Return facts about a run: names (text) with values (HTML). What nothing in the run folder says is left out."""
    known = algorithm_of(run)
    found = [
        ("Status", status(run)),
        ("Algorithm", escape(known) if known else ""),
        ("Model", escape(_model(run))),
        ("Layout", escape(_layout(run))),
        ("Precision", escape(run.setting("trainer.precision", ""))),
        ("Duration", _duration(run)),
        ("Memory", _memory(run)),
        ("Machine", escape(_machine(run.versions))),
        ("Versions", escape(_packages(run.versions))),
        ("Git", _git(run.git)),
        ("Seed", escape(run.setting("seed", ""))),
        ("Folder", f"<code>{escape(run.path)}</code>"),
    ]
    return [(name, value) for name, value in found if value]


def status(run: RunData) -> str:
    """Return how the run is or ended, as HTML."""
    said = run.summary.get("status")
    steps, planned = run.summary.get("steps"), run.summary.get("max_steps")
    if said is None:
        last = f", {run.unit} {int(run.rows[-1]['step'])} logged" if run.rows else ", nothing logged yet"
        return f"unknown (no readable summary.json{last})"
    if said == "running" and isinstance(steps, int) and run.rows:  # it is written at evaluations only
        steps = max(steps, int(run.rows[-1]["step"]))
    whole = f" of {escape(number(planned))}" if planned is not None else ""
    counted = f", {escape(number(steps))}{whole} {run.unit}s" if steps is not None else ""
    error = run.summary.get("error")
    return f"{escape(said)}{counted}{f': {escape(error)}' if error else ''}"


def times(run: RunData) -> str:
    """Return the wall-clock time of the parts of a run as a table with bars; empty if it is not known."""
    parts = run.summary.get("seconds")
    walls = {name: _number_in(part, "wall_s") for name, part in parts.items()} if isinstance(parts, Mapping) else {}
    known = {name: wall for name, wall in walls.items() if wall is not None}
    total = _number_in(run.summary, "wall_s") or sum(known.values())
    if not known or not total > 0:
        return ""
    rows = []
    for name, wall in sorted(known.items(), key=lambda item: -item[1]):
        share = min(wall / total, 1.0)
        bar = f'<span class="bar" style="width:{share * 100:.1f}%" aria-hidden="true"></span>'
        rows.append([f"<code>{escape(name)}</code>", seconds(wall), f"{share:.0%}{bar}"])
    header = ["part", "wall-clock time", "share of the whole run"]
    return table("Time per part of the run, measured by the first process", header, rows)


def algorithm_of(run: RunData) -> str:
    """Return the name of the algorithm: what the run says, else the one whose defaults its settings are closest to."""
    if run.entry or not run.config:
        return run.entry
    settings = flat(run.config)
    distances = {
        name: (len(defaults.keys() - run.config.keys()), len(_differences(settings, flat(defaults))))
        for name, defaults in _all_defaults().items()
        if run.config.keys() <= defaults.keys()  # a run of an earlier version may lack a section
    }
    return min(distances, key=lambda name: distances[name], default="")


def configuration(run: RunData) -> str:
    """Return the settings that differ from the defaults, and all settings, folded."""
    if not run.config:
        return "<p>config.yaml is missing or cannot be read.</p>"
    settings, name = flat(run.config), algorithm_of(run)
    defaults = _all_defaults().get(name)
    if defaults is None:
        changed = f"<p>The defaults of {escape(name or 'this algorithm')} are not known here.</p>"
    else:
        rows = [
            [f"<code>{escape(key)}</code>", _value(value), _value(default)]
            for key, (value, default) in _differences(settings, flat(defaults)).items()
        ]
        caption = f"Settings that differ from the defaults of <code>megarl {escape(name)}</code>: {len(rows)}"
        changed = table(caption, ["key", "value", "default"], rows)
    whole = "\n".join(f"{escape(key)}={escape(setting(value))}" for key, value in settings.items())
    return changed + folded(f"All {len(settings)} settings", f"<pre>{whole}</pre>")


def differing_settings(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return a table of the settings that are not the same in all runs, except for their folders."""
    flats = [{"algorithm": algorithm_of(run), **flat(run.config)} for run in runs]
    keys = dict.fromkeys(key for settings in flats for key in settings)
    rows = []
    for key in keys:
        values = [settings.get(key, _MISSING) for settings in flats]
        if key not in _OWN_KEYS and any(value != values[0] for value in values):
            rows.append([f"<code>{escape(key)}</code>", *map(_value, values)])
    if not rows:
        return "<p>All settings are the same, except for the folders of the runs.</p>"
    return table("Settings that are not the same in all runs", ["key", *map(escape, labels)], rows)


def side_by_side(runs: Sequence[RunData], labels: Sequence[str]) -> str:
    """Return the facts about several runs as a table."""
    every = [dict(about(run)) for run in runs]
    names = dict.fromkeys(name for known in every for name in known)
    rows = [[escape(name), *(known.get(name, NOTHING) for known in every)] for name in names]
    return table("The runs", ["what", *map(escape, labels)], rows)


def described(run: RunData) -> str:
    """Return the facts about one run as a list."""
    return facts(about(run))


@cache
def _all_defaults() -> dict[str, dict[str, Any]]:
    from megarl.config.algorithms import ALGORITHMS
    from megarl.config.defaults import defaults

    return {name: defaults(algorithm) for name, algorithm in ALGORITHMS.items()}


def _differences(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that have another value by default, with both, except for the folder of the run."""
    return {
        key: (value, defaults.get(key, _MISSING))
        for key, value in settings.items()
        if key not in _OWN_KEYS and value != defaults.get(key, _MISSING)
    }


def _value(value: Any) -> str:
    return NOTHING if value is _MISSING else f"<code>{escape(setting(value))}</code>"


def _model(run: RunData) -> str:
    path, model = run.setting("model.path"), run.setting("model")
    if not isinstance(model, Mapping):
        return ""
    layers, hidden, heads = (model.get(name) for name in ("num_layers", "hidden_size", "num_heads"))
    encoder, parts = model.get("encoder"), ""
    if isinstance(encoder, Mapping):
        layers, parts = f"{encoder.get('num_layers')} + {layers}", " (encoder + decoder)"
    shape = f"{layers} layers{parts}, hidden size {hidden}, {heads} heads"
    return f"{shape}, from {path}" if path else f"{shape}, from random weights"


def _layout(run: RunData) -> str:
    parallel = run.setting("parallel")
    if not isinstance(parallel, Mapping):
        return ""
    sizes = {name: parallel.get(name) for name in ("tp", "pp", "cp", "vpp")}
    said = [f"{name} {size}" for name, size in sizes.items() if isinstance(size, int) and size > 1]
    world = run.summary.get("world_size")
    if isinstance(world, int):
        model_parallel = 1
        for name in ("tp", "pp", "cp"):
            size = sizes[name]
            model_parallel *= size if isinstance(size, int) and size > 0 else 1
        replicas = world // model_parallel
        said += [f"dp {replicas}"] if replicas > 1 else []
        count = f"{world} process{'es' * (world > 1)}"
        return f"{count}: {', '.join(said)}" if said else count
    return ", ".join(said)


def _duration(run: RunData) -> str:
    wall, cpu = _number_in(run.summary, "wall_s"), _number_in(run.summary, "cpu_s")
    if wall is None:
        return ""
    updated = run.summary.get("updated")
    until = f", until {escape(updated)}" if isinstance(updated, str) else ""
    return f"{seconds(wall)}{f' ({seconds(cpu)} of CPU time)' if cpu is not None else ''}{until}"


def _memory(run: RunData) -> str:
    peak = _number_in(run.summary, "peak_memory_gb")
    return f"{number(peak)} GB at the peak of the first process" if peak else ""


def _machine(versions: Mapping[str, Any]) -> str:
    cpu, gpu = versions.get("cpu"), versions.get("gpu")
    gpus = gpu.get("names") if isinstance(gpu, Mapping) else None
    if isinstance(gpus, list) and gpus:
        return f"{len(gpus)} of {gpus[0]}"
    if isinstance(cpu, Mapping):
        return f"{cpu.get('count')} cores, {cpu.get('name')}, {versions.get('memory_gb')} GB"
    return ""


def _packages(versions: Mapping[str, Any]) -> str:
    names = ("megarl", "python", "torch", "megatron-core", "lightning", "transformers")
    return ", ".join(f"{name} {versions[name]}" for name in names if isinstance(versions.get(name), str))


def _git(git: Mapping[str, Any]) -> str:
    commit = git.get("commit")
    if not isinstance(commit, str):
        return ""
    changed = " with changes (git.diff)" if git.get("dirty") else ""
    return f"<code>{escape(commit[:12])}</code>{changed}"


def _number_in(mapping: Any, name: str) -> float | None:
    value = mapping.get(name) if isinstance(mapping, Mapping) else None
    return as_number(value)
