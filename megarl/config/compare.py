"""The keys of `megarl compare`, written compare.KEY. All other keys on its command line are those of the runs."""

from __future__ import annotations

from dataclasses import dataclass

from megarl.config.leaf import leaf


@dataclass
class CompareConfig:
    """What is compared, over which seeds, and how sure the answer must be."""

    seeds: int = leaf(3, "Number of seeds with which each of the two runs.", at_least=1, at_most=1000)
    first_seed: int = leaf(1, "The first seed; the others follow it.", at_least=0)
    metric: str | None = leaf(
        None, "Metric that decides, as in summary.json of a run: eval/loss or eval/score, for example."
    )
    value: str = leaf(
        "last",
        "Which value of a metric counts: the last of the run, its best, or the mean of the last five.",
        ("last", "best", "last5"),
    )
    all: bool = leaf(False, "Print every metric that both have logged; compare.metric alone decides.")
    interval: str = leaf(
        "t",
        "Interval of the mean difference over seeds. t: Student's, for differences that are about normal; bootstrap: "
        "percentiles of resampled differences, for ten seeds or more.",
        ("t", "bootstrap"),
    )
    confidence: float = leaf(0.95, "Confidence of the interval.", above=0, below=1)
    fail: bool = leaf(False, "End with exit code 1 if the two differ; --fail does the same.")
    at_once: int = leaf(1, "Number of runs at the same time.", at_least=1, at_most=1024)
    cpus: int | None = leaf(
        None, "Number of CPU threads per run (null: the machine's cores divided by compare.at_once).", at_least=1
    )
    dir: str | None = leaf(
        None,
        "Folder of the runs, and of differences.json and differences.html. With a folder of an earlier comparison, "
        "runs that are finished there are not repeated, whatever has changed in the code since (null: a new folder, "
        "runs/compare-TIME).",
    )
