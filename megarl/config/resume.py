"""What a resumed run takes from its checkpoint and what from its own configuration, key by key.

`python -m megarl.config.resume` prints the table of docs/checkpoints.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_type_hints

from megarl.config.advantages import ADVANTAGES
from megarl.config.leaf import optional_sections, section_kind
from megarl.config.offers import either
from megarl.config.renames import renamed_tree
from megarl.errors import CheckpointError

NOW, CHECKPOINT, REFUSED = "takes effect now", "taken from the checkpoint", "refused"


@dataclass(frozen=True)
class Rule:
    """How a resume treats some keys, and why. `quiet` keys are expected to differ and are not worth a line."""

    keys: tuple[str, ...]
    kind: str
    reason: str
    quiet: bool = False


def _rule(section: str, names: str, kind: str, reason: str, *, quiet: bool = False) -> Rule:
    prefix = f"{section}." if section else ""
    return Rule(tuple(prefix + name for name in names.split()), kind, reason, quiet)


_HAPPENED = "the weights it led to are in the checkpoint; a reference is what the run started from"
_SHAPE = "the stored weights are of a model of this shape"
_BUDGET = "a learning rate that decays follows the new length at once"

RULES = (
    _rule("run", "dir name resume", NOW, "where this process writes and what it restores", quiet=True),
    _rule("", "debug", NOW, "how this process reports"),
    _rule(
        "", "seed", NOW, "order of data and what is sampled; initial weights and dropout's state are the checkpoint's"
    ),
    # models
    _rule("model", "path init_std", CHECKPOINT, _HAPPENED),
    _rule("model", "num_layers hidden_size num_heads num_kv_heads head_dim ffn_size vocab_size", REFUSED, _SHAPE),
    _rule("model", "position position_offset rope_base rope_percent rope_interleaved", REFUSED, _SHAPE),
    _rule("model", "rope_scaling rope_factor rope_low_freq_factor rope_high_freq_factor", REFUSED, _SHAPE),
    _rule("model", "rope_original_positions norm norm_eps activation tie_embeddings qk_norm", REFUSED, _SHAPE),
    _rule("model", "qkv_bias out_bias mlp_bias lm_head_bias parallel_residual sliding_window", REFUSED, _SHAPE),
    _rule("model", "max_positions", NOW, "the context; a table of learned positions of another size is refused"),
    _rule("model", "dropout", NOW, "it is no part of the weights"),
    _rule("model", "num_layers_unfrozen", REFUSED, "optimizer state exists for the layers that train"),
    _rule("critic", "kind", REFUSED, "the checkpoint holds a shared head, a separate model, or no critic"),
    _rule("critic", "separate.path", CHECKPOINT, "the weights it led to are in the checkpoint"),
    _rule("critic", "separate.lr", NOW, "the schedule continues at its step with the new rate"),
    _rule("critic", "separate.warmup_phases", NOW, _BUDGET),
    _rule("ilql", "two_qs", REFUSED, "the checkpoint holds one Q head or two"),
    _rule("tokenizer", "kind path", REFUSED, "token ids would mean other text; the same tokenizer elsewhere is fine"),
    _rule("clone", "data steps lr", CHECKPOINT, _HAPPENED),
    # where and how it is computed
    _rule("parallel", "tp pp cp vpp sequence_parallel", NOW, "tensors are stored by name; dropout is seeded anew"),
    _rule("parallel", "recompute timeout_s kernels offload", NOW, "how this process computes"),
    _rule("trainer", "devices num_nodes accelerator", NOW, "where it computes"),
    _rule("trainer", "precision", NOW, "weights are converted; the optimizer's own are float32 in both"),
    _rule("trainer", "max_steps max_phases", NOW, _BUDGET),
    _rule(
        *("trainer", "global_batch_size", NOW),
        "data goes on with the first row that was not used yet; PPO's learning rate follows the phases",
    ),
    _rule("trainer", "micro_batch_size eval_batch_size", NOW, "how this process computes"),
    _rule("trainer", "eval_every max_time", NOW, "evaluations and the time limit from here on"),
    _rule("trainer", "log_every peak_tflops progress", NOW, "how this process reports"),
    _rule("trainer", "exp_manager exp_manager_options", NOW, "how this process reports"),
    # data
    _rule("data", "train train_split", NOW, "the new data is taken up after as many rows as were used of the old"),
    _rule("data", "eval eval_split eval_limit", NOW, "evaluations before and after are of different records"),
    _rule(
        "data", "format text_key prompt_key completion_key messages_key samples_key rewards_key", NOW, "how it is read"
    ),
    _rule("data", "chat_template", NOW, "prompts, and the tokens that end responses, from here on"),
    _rule("data", "seq_length too_long loss_on cache", NOW, "how it is read"),
    _rule("data", "options", NOW, "the data from here on"),
    _rule("data", "pack group_by_length shuffle", NOW, "the order from here on; records may repeat within an epoch"),
    # optimization
    _rule(
        "optim", "lr min_lr_ratio warmup_steps schedule", NOW, "the schedule goes on at its step by the new settings"
    ),
    _rule("optim", "weight_decay beta1 beta2 eps clip_grad", NOW, "Adam's moments are the checkpoint's"),
    # algorithms
    _rule(
        *("ppo", "rollouts", NOW),
        "prompts go on with the first that was not used yet; the learning rate follows the phases",
    ),
    _rule("ppo", "advantages", REFUSED, "the checkpoint holds the critic that they need, or none"),
    _rule("ppo", "inner_epochs", NOW, _BUDGET),
    _rule("ppo", "gamma lam clip_low clip_high dual_clip ratio aggregation clip_value", NOW, "the loss from here on"),
    _rule("ppo", "vf_coef entropy_coef kl_in kl_kind", NOW, "the loss from here on"),
    _rule("ppo", "kl_limit stop_at_kl", NOW, "the limits from here on"),
    _rule(
        "ppo", "kl_coef kl_target", NOW, "a steered coefficient goes on from the checkpoint unless one of them changed"
    ),
    _rule("ppo", "kl_horizon", NOW, "a steered coefficient goes on from the checkpoint"),
    _rule("ppo", "clip_scores", NOW, "the scores' moments are counted anew"),
    _rule("ppo", "scale_scores whiten_advantages whiten_rewards", NOW, "the scores' moments are the checkpoint's"),
    _rule("ppo", "missing_eos_penalty mask_overlong", NOW, "rewards from here on"),
    _rule("ppo", "pack invariants", NOW, "how this process computes"),
    _rule("rft", "prompts", NOW, "prompts go on with the first that was not used yet"),
    _rule("rft", "improve_steps", NOW, _BUDGET),
    _rule("rft", "start_percentile end_percentile", NOW, "what is kept from here on"),
    _rule("ilql", "tau gamma cql_scale awac_scale awac_beta", NOW, "the loss from here on"),
    _rule("ilql", "target_alpha target_every", NOW, "the target heads are the checkpoint's"),
    _rule("ilql", "pack", NOW, "how this process computes"),
    # generation, scores, evaluation
    _rule(
        "rollout", "max_new_tokens temperature top_k top_p min_p repetition_penalty stop", NOW, "responses from here on"
    ),
    _rule("rollout", "n", NOW, "prompts go on with the first that was not used yet"),
    _rule("rollout", "slots cache_bytes layout cuda_graphs", NOW, "how this process computes"),
    _rule("rollout", "too_long dump replay ilql_beta", NOW, "responses from here on"),
    _rule(
        "reward",
        "fn options",
        NOW,
        "no score of another function, code or option is reused, and the scores' moments are counted anew",
    ),
    _rule("reward", "timeout retries on_error batch_size devices", NOW, "how the function is called"),
    _rule("metric", "fn", NOW, "evaluations from here on"),
    _rule("eval", "n table sweep.temperature sweep.beta", NOW, "evaluations from here on"),
    # what is kept
    _rule("checkpoint", "every keep_last keep_best async_save save_last", NOW, "checkpoints from here on"),
    _rule("checkpoint", "metric mode", NOW, "checkpoints are ranked by what was measured of this metric alone"),
    _rule("export", "hf", NOW, "what is left behind at the end"),
    _rule("logger", "tensorboard csv wandb.project wandb.mode mlflow.uri", NOW, "where metrics go"),
)

BEFORE = {"ppo.advantages": "gae"}
"""What was in force where a checkpoint lacks a key, as it is older than the key."""

TABLE: dict[str, Rule] = {key: rule for rule in RULES for key in rule.keys}


@dataclass(frozen=True)
class Difference:
    """A key that had another value in the run that is resumed, or names a file that `changed` since."""

    key: str
    old: Any
    new: Any
    changed: bool = False

    @property
    def rule(self) -> Rule:
        """How a resume treats the key."""
        return _rule_of(self.key)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}{' (with other content than it had)' if self.changed else ''}"

    @property
    def remedy(self) -> str:
        """What to set so that the resume is not refused."""
        if isinstance(self.old, Mapping) and self.key not in TABLE:
            return " ".join(f"{self.key}.{name}={either([value])}" for name, value in self.old.items())
        setting = f"{self.key}={either([self.old])}"
        return f"{setting} with the content that it had" if self.changed else setting


def differences(
    before: Mapping[str, Any],
    started_as: Mapping[str, Any],
    now: Mapping[str, Any],
    *,
    tree: type,
    same_tokenizer: bool,
    same_template: bool | None = None,
) -> list[Difference]:
    """Every key that both runs have, and whose value another was in force in the run that is resumed.

    Args:
        before: configuration, as nested plain values, of the run that wrote the checkpoint.
        started_as: of the first run of its line, which made what only a start makes.
        now: of this run.
        tree: the class of the configuration. Of an optional section that only one of the runs has, the section is told.
        same_tokenizer: whether both read and write text alike, wherever their files lie.
        same_template: whether both have the same text as data.chat_template, wherever its file lies. None: unknown.
    """
    before, started_as, now = (_comparable(plain, tree) for plain in (before, started_as, now))
    found: list[Difference] = []
    alone: set[str] = set()  # sections that one run has, or none
    for section in optional_sections(tree):
        theirs = started_as if _rule_of(section.key).kind == CHECKPOINT else before
        if _has(theirs, section.key) and _has(now, section.key):
            old, new = (None if section.is_off(value) else value for value in _values(section.key, theirs, now))
            if (old is None) != (new is None):
                found.append(Difference(section.key, old, new))
            if None in (old, new):
                alone.add(section.key)
    for key, rule in TABLE.items():
        theirs = started_as if rule.kind == CHECKPOINT else before
        if not (_has(theirs, key) and _has(now, key)) or key.startswith("tokenizer."):
            continue
        if key.rpartition(".")[0] in alone:
            continue
        (old, new), changed = _values(key, theirs, now), False
        if (old is None) != (new is None):
            old, new = _in_force(theirs, key), _in_force(now, key)
        unknown = key == "model.vocab_size" and None in (old, new)  # the tokenizer's, or checked with the weights
        same = old == new or (key == "critic.kind" and _critic_of(theirs) == _critic_of(now))
        if key == "data.chat_template" and same_template is not None:
            changed, same = same and not same_template, same_template
        if not same and not unknown:
            found.append(Difference(key, old, new, changed))
    return found if same_tokenizer else [*found, *_tokenizers(before, now)]


def refuse(found: list[Difference], folder: str) -> None:
    """End here where the checkpoint cannot be gone on from by this run's settings."""
    wrong = [difference for difference in found if difference.rule.kind == REFUSED]
    if wrong:
        said = "; ".join(f"{difference} ({difference.rule.reason})" for difference in wrong)
        remedy = " ".join(difference.remedy for difference in wrong)
        raise CheckpointError(
            f"the checkpoint {folder} does not fit settings (as model.* are) that a resume cannot change: {said}; "
            f"use {remedy}, or start another run (another run.dir, or run.resume=never)",
            key=wrong[0].key,
            value=wrong[0].new,
            where=folder,
            offers={difference.key: [difference.old] for difference in wrong},
        )


def told(found: list[Difference]) -> str:
    """What differs, as one line; empty where nothing does that is worth a word."""
    return "; ".join(
        f"{difference} ({difference.rule.kind}: {difference.rule.reason})"
        for difference in found
        if not difference.rule.quiet
    )


def from_plain(tree: type, plain: Mapping[str, Any]) -> Any:
    """A configuration from the plain values a checkpoint keeps. Keys of other versions are left out or at defaults."""
    return _from_plain(tree, renamed_tree(plain, tree, warn=False))


def _from_plain(tree: type, plain: Mapping[str, Any]) -> Any:
    hints = get_type_hints(tree)
    values = {}
    for item in fields(tree):
        if item.name in plain:
            kind, value = section_kind(hints[item.name]), plain[item.name]
            values[item.name] = value if kind is None or value is None else _from_plain(kind, value)
    return tree(**values)


def rows() -> Iterator[str]:
    """The table of docs/checkpoints.md, a line at a time."""
    yield "| key | on a resume | why, or what that means |"
    yield "| --- | --- | --- |"
    for rule in RULES:
        yield f"| {', '.join(f'`{key}`' for key in rule.keys)} | {rule.kind} | {rule.reason} |"


def _tokenizers(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """By which keys two tokenizers differ that are known to; a file may have changed where it lies."""
    old, new = before["tokenizer"], now["tokenizer"]
    named = [Difference(f"tokenizer.{key}", old[key], new[key]) for key in ("kind", "path") if old[key] != new[key]]
    return named or [Difference("tokenizer.path", old["path"], new["path"], changed=True)]


def _comparable(plain: Mapping[str, Any], tree: type) -> dict[str, Any]:
    """A configuration in today's keys, with defaults in sections where null means them."""
    found: dict[str, Any] = renamed_tree(plain, tree, warn=False)
    for section in optional_sections(tree):
        if section.null_is_defaults and _has(found, section.key) and _value(found, section.key) is None:
            *parents, name = section.key.split(".")
            holder = found
            for part in parents:
                holder = holder[part]
            holder[name] = asdict(section.kind())
    for key, value in BEFORE.items():
        *parents, name = key.split(".")
        if _has(found, parents[0]):
            found[parents[0]].setdefault(name, value)
    return found


def _rule_of(key: str) -> Rule:
    """The rule of a key; of an optional section, that of its first key."""
    return TABLE.get(key) or next(rule for known, rule in TABLE.items() if known.startswith(key + "."))


def _values(key: str, *plain: Mapping[str, Any]) -> list[Any]:
    return [_value(one, key) for one in plain]


def _critic_of(plain: Mapping[str, Any]) -> str:
    """Shared, separate or none, as the advantages need it."""
    needs = ADVANTAGES[plain["ppo"]["advantages"]]
    return str(plain["critic"]["kind"]) if needs.values else "none"


def _has(plain: Mapping[str, Any], key: str) -> bool:
    node: Any = plain
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return False
        node = node[part]
    return True


def _value(plain: Mapping[str, Any], key: str) -> Any:
    node: Any = plain
    for part in key.split("."):
        node = node[part]
    return node


def _in_force(plain: Mapping[str, Any], key: str) -> Any:
    """A key's value; where null stands for one that follows from others, that one."""
    value, model = _value(plain, key), plain["model"]
    if value is None and key == "model.num_kv_heads":
        return model["num_heads"]
    if value is None and key == "model.head_dim":
        return model["hidden_size"] // model["num_heads"]
    if value is None and key == "model.ffn_size":
        return 4 * model["hidden_size"]
    if value is None and key == "ppo.whiten_advantages":
        return ADVANTAGES[plain["ppo"].get("advantages", "gae")].whitened
    return value


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
