"""What the name of a metric says: whether less of it is better."""

_LOWER = ("loss", "nll", "perplexity", "kl", "error", "seconds", "memory_gb", "_se")


def is_lower_better(metric: str, mode: str = "auto") -> bool:
    """Return whether a metric should be small. `mode` is min, max, or auto, which decides by the end of the name,
    without the setting of a sweep behind it."""
    return metric.partition("@")[0].endswith(_LOWER) if mode == "auto" else mode == "min"
