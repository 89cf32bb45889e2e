"""The names of the commands of `megarl`, each with a few words for `megarl --help`. Importing it takes no time."""

from __future__ import annotations

ALGORITHMS = {
    "sft": "supervised fine-tuning",
    "ppo": "prompts and a reward function, with a critic",
    "grpo": "prompts and a reward function, without a critic",
    "rft": "prompts and a reward function: fine-tune on the best responses",
    "ilql": "samples with rewards, without generating",
    "dpo": "pairs of a preferred and a rejected response",
    "kto": "responses that are labelled good or bad",
    "orpo": "pairs, without fine-tuning first",
    "cpo": "pairs, without a reference",
    "rm": "a reward model",
}
"""Commands that train, by name; a test compares them with the table of algorithms, which takes longer to import."""

PROGRAMS = {
    "generate": ("generate", "responses to prompts"),
    "chat": ("generate", "talk to a model in the terminal"),
    "evaluate": ("evaluate", "measures of a model on held-out prompts"),
    "serve-reward": ("serve_reward", "a reward model over HTTP"),
    "sweep": ("sweep", "many runs that search for good settings"),
    "compare": ("compare", "two settings or revisions on the same seeds"),
    "convert": ("convert", "a model in another format"),
    "plan": ("plan", "memory and time of a run, before it is queued"),
    "selftest": ("selftest", "does a layout compute the same numbers here?"),
    "why-stuck": ("why_stuck", "which process does a run wait for?"),
}
"""Other programs, by command: the module in megarl, and what it is for."""


def command_names() -> list[str]:
    """Return the names of all commands that `megarl --help` lists."""
    return [*ALGORITHMS, "train", *PROGRAMS, "report", "watch", "new", "ls", "show", "doctor", "completion", "help"]
