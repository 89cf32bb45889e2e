"""For every key, whether a resume uses the value of this run or of the checkpoint, or refuses another value.

`python -m megarl.config.resume` prints the table of docs/checkpoints.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megarl.config.advantages import Needs, needs_of
from megarl.config.leaf import hints_of, leaves, optional_sections, section_kind
from megarl.config.offers import either
from megarl.config.renames import renamed_tree
from megarl.config.sections.optim import momentum_in_force
from megarl.errors import CheckpointError, ConfigError

NOW, CHECKPOINT, REFUSED = "takes effect now", "taken from the checkpoint", "refused"


@dataclass(frozen=True)
class Rule:
    """How a resume treats some keys, and why. Differences in `quiet` keys are expected and not logged."""

    keys: tuple[str, ...]
    kind: str
    reason: str
    quiet: bool = False


def _rule(section: str, names: str, kind: str, reason: str, *, quiet: bool = False) -> Rule:
    prefix = f"{section}." if section else ""
    return Rule(tuple(prefix + name for name in names.split()), kind, reason, quiet)


_HAPPENED = "the resulting weights are in the checkpoint; a reference model is the one that the run started from"
_SHAPE = "the stored weights fit only this architecture"
_BUDGET = "a decaying learning rate follows the new length at once"

RULES = (
    _rule("run", "dir name resume", NOW, "where this process writes and what it restores", quiet=True),
    _rule("", "debug", NOW, "how this process logs and displays"),
    _rule("", "seed", NOW, "order of data and sampling; initial weights and dropout's state: the checkpoint's"),
    # models
    _rule(
        *("model", "path init_std", CHECKPOINT),
        f"{_HAPPENED}; with adapters, it must give the same weights again",
    ),
    _rule("model", "num_layers hidden_size num_heads num_kv_heads head_dim ffn_size vocab_size", REFUSED, _SHAPE),
    _rule("model", "position position_offset rope_base rope_percent rope_interleaved", REFUSED, _SHAPE),
    _rule(
        *("model.rope_scaling", "kind factor low_freq_factor high_freq_factor original_positions", REFUSED),
        _SHAPE,
    ),
    _rule("model.encoder", "num_layers buckets longest_distance start_id scale_outputs", REFUSED, _SHAPE),
    _rule("model.experts", "count chosen ffn_size normalise shared_ffn_size dense_layers", REFUSED, _SHAPE),
    _rule("model.experts", "balance z_loss", NOW, "the losses of the router after the resume"),
    _rule("model", "norm norm_eps activation tie_embeddings qk_norm", REFUSED, _SHAPE),
    _rule("model", "qkv_bias out_bias mlp_bias lm_head_bias parallel_residual sliding_window", REFUSED, _SHAPE),
    _rule("model", "max_positions", NOW, "length of the context; with learned positions, another size is refused"),
    _rule("model", "dropout", NOW, "the weights do not depend on it"),
    _rule("model", "num_layers_unfrozen", REFUSED, "the checkpoint has optimizer state for the trainable layers only"),
    _rule("adapter", "kind rank targets", REFUSED, "the checkpoint contains these factors"),
    _rule("adapter", "alpha rslora", REFUSED, "the stored factors were trained at this scale"),
    _rule("adapter", "path", CHECKPOINT, _HAPPENED),
    _rule("adapter", "dropout", NOW, "the weights do not depend on it"),
    _rule("adapter", "base_bits", REFUSED, "the factors were trained beside the weights in this form"),
    _rule("critic", "kind", REFUSED, "the checkpoint contains a shared head, a separate model, or no critic"),
    _rule("critic", "separate.path", CHECKPOINT, "the resulting weights are in the checkpoint"),
    _rule("critic", "separate.lr", NOW, "the schedule continues at its step with the new rate"),
    _rule("critic", "separate.warmup_phases", NOW, _BUDGET),
    _rule("ilql", "two_qs", REFUSED, "the checkpoint contains one Q head or two"),
    _rule(
        "tokenizer",
        "kind path",
        REFUSED,
        "token ids would stand for other text; another path to the same tokenizer is fine",
    ),
    _rule("clone", "data steps lr", CHECKPOINT, _HAPPENED),
    # where and how it is computed
    _rule(
        "parallel",
        "tp pp cp ep vpp sequence_parallel",
        NOW,
        "tensors are stored by name; dropout's random state is reinitialised",
    ),
    _rule("parallel", "recompute timeout_s kernels offload", NOW, "how this process computes"),
    _rule("launch", "elastic", NOW, "the layout of this start", quiet=True),
    _rule("trainer", "devices num_nodes accelerator", NOW, "where the run computes"),
    _rule("trainer", "precision", NOW, "weights are converted; the optimizer state is float32 in both"),
    _rule(
        *("trainer", "max_steps max_phases", NOW),
        f"{_BUDGET}; so do data.mixing's weights without data.mixing.over_phases",
    ),
    _rule(
        *("trainer", "global_batch_size", NOW),
        "data continues at the first unused row; PPO's learning rate depends on completed phases",
    ),
    _rule("trainer", "micro_batch_size eval_batch_size", NOW, "how this process computes"),
    _rule("trainer", "eval_every max_time", NOW, "evaluations and the time limit after the resume"),
    _rule("trainer", "log_every progress", NOW, "how this process logs and displays"),
    _rule(
        *("extensions", "callbacks callback_options", NOW),
        "the callbacks after the resume; one that is still named gets its state from the checkpoint",
    ),
    _rule("extensions", "orchestrator", NOW, "the experience of phases after the resume"),
    _rule("extensions", "families", NOW, "the families that stored models are read and exported as"),
    _rule("extensions", "nemo exp_manager", NOW, "how this process logs and displays"),
    # data
    _rule("data", "train train_split", NOW, "the new data starts after as many rows as were used of the old"),
    _rule("data.mixing", "weights final_weights over_phases", NOW, "the choice of prompts after the resume"),
    _rule("data", "eval eval_split eval_limit", NOW, "evaluations before and after the resume use different records"),
    _rule(
        "data",
        "format text_key prompt_key completion_key messages_key samples_key rewards_key",
        NOW,
        "how data is read",
    ),
    _rule("data", "chosen_key rejected_key label_key on_error", NOW, "how data is read"),
    _rule("data", "margin_key responses_key ranks_key scores_key score_key", NOW, "how data is read"),
    _rule("data", "steps_key labels_key step_separator", NOW, "how data is read"),
    _rule("data", "chat_template", NOW, "prompts, and tokens that end responses, after the resume"),
    _rule("data", "seq_length too_long loss_on cache", NOW, "how data is read"),
    _rule("data", "options", NOW, "data that is read after the resume"),
    _rule(
        "data", "pack group_by_length shuffle", NOW, "the order after the resume; records may repeat within an epoch"
    ),
    # optimization
    _rule(
        "optim",
        "lr min_lr_ratio warmup_steps schedule",
        NOW,
        "the schedule continues at its step with the new settings",
    ),
    _rule("optim", "kind", REFUSED, "the checkpoint contains the state of this kind of optimizer"),
    _rule(
        *("optim", "momentum", NOW),
        "the momentum buffers come from the checkpoint; a change from 0 or to 0 is refused",
    ),
    _rule("optim", "weight_decay beta1 beta2 eps clip_grad", NOW, "the optimizer's moments come from the checkpoint"),
    # algorithms
    _rule(
        *("ppo", "rollouts", NOW),
        "prompts continue at the first unused one; the learning rate depends on completed phases",
    ),
    _rule("ppo", "advantages", REFUSED, "the checkpoint contains the critic that these advantages need, or none"),
    _rule("ppo", "inner_epochs", NOW, _BUDGET),
    _rule(
        "ppo",
        "gamma lam objective clip_low clip_high dual_clip ratio aggregation clip_value",
        NOW,
        "the loss after the resume",
    ),
    _rule("ppo", "vf_coef entropy_coef kl_in kl_kind", NOW, "the loss after the resume"),
    _rule("ppo", "kl_limit stop_at_kl", NOW, "the limits after the resume"),
    _rule(
        "ppo", "kl_coef adaptive_kl.target", NOW, "an adaptive coefficient continues unless one of these has changed"
    ),
    _rule("ppo", "adaptive_kl.horizon", NOW, "an adaptive coefficient continues"),
    _rule("ppo", "clip_scores", NOW, "the running moments of the scores restart"),
    _rule(
        "ppo",
        "scale_scores whiten_advantages whiten_rewards",
        NOW,
        "the running moments of the scores come from the checkpoint",
    ),
    _rule("ppo.overlong", "mask missing_eos_penalty penalty buffer", NOW, "rewards after the resume"),
    _rule("ppo.dynamic_sampling", "limit", NOW, "the choice of prompts after the resume"),
    _rule("ppo.correction", "level method low high", NOW, "the loss after the resume"),
    _rule(
        "ppo.action_mask",
        "top_p refresh_every",
        NOW,
        "the mask after the resume; switching it on or off is refused, as the checkpoint contains the copy, or none",
    ),
    _rule(
        "ppo.adaptive_entropy",
        "target step maximum",
        NOW,
        "an adapted coefficient continues; with another target or ppo.entropy_coef, it starts from ppo.entropy_coef",
    ),
    _rule("ppo", "pack", NOW, "how this process computes"),
    _rule("rft", "prompts", NOW, "prompts continue at the first unused one"),
    _rule("rft", "improve_steps", NOW, _BUDGET),
    _rule("rft", "start_percentile end_percentile", NOW, "the selection of responses after the resume"),
    _rule("ilql", "tau gamma cql_scale awac_scale awac_beta", NOW, "the loss after the resume"),
    _rule("ilql", "target_alpha target_every", NOW, "the target heads come from the checkpoint"),
    _rule("ilql", "pack", NOW, "how this process computes"),
    _rule("dpo", "beta kind mix label_smoothing average_logprobs sft_coef", NOW, "the loss after the resume"),
    _rule(
        "dpo",
        "reference reference_path cache",
        NOW,
        "where the log-probs of the reference come from; other weights are refused",
    ),
    _rule("kto", "beta desirable_weight undesirable_weight", NOW, "the loss after the resume"),
    _rule(
        "kto",
        "reference reference_path cache",
        NOW,
        "where the log-probs of the reference come from; other weights are refused",
    ),
    _rule("orpo", "beta", NOW, "the loss after the resume"),
    _rule("cpo", "kind beta gamma label_smoothing sft_coef", NOW, "the loss after the resume"),
    _rule("rm", "kind center_coef step_loss", NOW, "the loss after the resume"),
    _rule("rm", "init_std", CHECKPOINT, _HAPPENED),
    _rule("rm", "normalise", NOW, "whether later checkpoints describe the scores"),
    # generation, scores, evaluation
    _rule(
        "rollout",
        "max_new_tokens temperature top_k top_p min_p repetition_penalty stop",
        NOW,
        "responses after the resume",
    ),
    _rule("rollout", "n", NOW, "prompts continue at the first unused one"),
    _rule(
        "rollout",
        "engine.slots engine.cache_bytes engine.layout engine.cuda_graphs engine.router_replay",
        NOW,
        "how this process computes",
    ),
    _rule("rollout", "too_long dump replay ilql_beta", NOW, "responses after the resume"),
    _rule(
        "reward",
        "fn model url terms options",
        NOW,
        "scores of another function, code, option or served model are not reused, and the running moments of the "
        "scores restart",
    ),
    _rule(
        *("reward", "calls.timeout calls.retries calls.batch_size calls.devices calls.on_error", NOW),
        "how the function or the servers are called",
    ),
    _rule("metric", "fn", NOW, "evaluations after the resume"),
    _rule("eval", "n vote table sweep.temperature sweep.beta", NOW, "evaluations after the resume"),
    # what is kept
    _rule("checkpoint", "every keep_last best.keep async_save save_last", NOW, "checkpoints after the resume"),
    _rule("checkpoint", "best.metric best.mode", NOW, "checkpoints are ranked by their values of this metric only"),
    _rule("export", "hf peft", NOW, "what is exported when training ends"),
    _rule("health", "stop_on", NOW, "the findings that end the run after the resume"),
    _rule("health", "peak_tflops invariants", NOW, "how this process checks and logs"),
    _rule("logger", "tensorboard csv wandb.project wandb.mode mlflow.uri", NOW, "where metrics are logged"),
)

BEFORE = {"ppo.advantages": "gae", "ppo.action_mask": None, "optim.kind": "adamw", "optim.momentum": 0.0}
"""Values of keys that a checkpoint lacks because it is older than the key."""

TABLE: dict[str, Rule] = {key: rule for rule in RULES for key in rule.keys}

_MOMENTUM_SWITCHED = _rule("optim", "momentum", REFUSED, "the checkpoint contains momentum buffers, or none")
_FOREIGN = Rule((), NOW, "a key of an algorithm outside of megarl")
_MASK_SWITCHED = _rule("ppo", "action_mask", REFUSED, "the checkpoint contains the copy that masks, or none")


@dataclass(frozen=True)
class Difference:
    """A key whose value differs from the resumed run's, or that names a file whose content has `changed` since."""

    key: str
    old: Any
    new: Any
    changed: bool = False

    @property
    def rule(self) -> Rule:
        """The rule for the key."""
        if self.key == "optim.momentum" and 0 in (self.old, self.new):
            return _MOMENTUM_SWITCHED
        if self.key == "ppo.action_mask":
            return _MASK_SWITCHED
        return _rule_of(self.key)

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}{' (with other content than it had)' if self.changed else ''}"

    @property
    def remedy(self) -> str:
        """The settings with which the resume is not refused."""
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
    """Return the keys that both runs have and whose values differ.

    Args:
        before: configuration of the run that wrote the checkpoint, as nested plain values.
        started_as: configuration of the first run in the chain of resumes. Keys that act only at the start of a run are
            compared with it.
        now: configuration of this run.
        tree: the class of the configuration. If only one of the runs has an optional section switched on, the result
            contains the section instead of its keys.
        same_tokenizer: whether both have the same tokenizer, whatever its path.
        same_template: whether both have the same text as data.chat_template, whatever its path. None: unknown.
    """
    before, started_as, now = (_comparable(plain, tree) for plain in (before, started_as, now))
    found: list[Difference] = []
    alone: set[str] = set()  # optional sections that are off in at least one of the runs
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
        unknown = key == "model.vocab_size" and None in (
            old,
            new,
        )  # follows from the tokenizer, or is checked with the weights
        same = old == new or (key == "critic.kind" and _critic_of(theirs) == _critic_of(now))
        if key == "data.chat_template" and same_template is not None:
            changed, same = same and not same_template, same_template
        if not same and not unknown:
            found.append(Difference(key, old, new, changed))
    found += _of_foreign_keys(before, now, tree)
    return found if same_tokenizer else [*found, *_tokenizers(before, now)]


def _of_foreign_keys(before: Mapping[str, Any], now: Mapping[str, Any], tree: type) -> Iterator[Difference]:
    """Yield the differences of keys that only an algorithm outside of megarl has."""
    for leaf in leaves(tree):
        if leaf.key not in TABLE and _has(before, leaf.key) and _has(now, leaf.key):
            old, new = _values(leaf.key, before, now)
            if old != new:
                yield Difference(leaf.key, old, new)


def refuse(found: list[Difference], folder: str) -> None:
    """Raise `CheckpointError` if one of the differences does not allow a resume."""
    wrong = [difference for difference in found if difference.rule.kind == REFUSED]
    if wrong:
        said = "; ".join(f"{difference} ({difference.rule.reason})" for difference in wrong)
        remedy = " ".join(difference.remedy for difference in wrong)
        raise CheckpointError(
            f"the checkpoint {folder} was written with other values of keys that a resume cannot change: {said}; "
            f"use {remedy}, or start another run (another run.dir, or run.resume=never)",
            key=wrong[0].key,
            value=wrong[0].new,
            where=folder,
            offers={difference.key: [difference.old] for difference in wrong},
        )


def told(found: list[Difference]) -> str:
    """Return the differences as one line for the log; empty if none is worth logging."""
    return "; ".join(
        f"{difference} ({difference.rule.kind}: {difference.rule.reason})"
        for difference in found
        if not difference.rule.quiet
    )


def from_plain(tree: type, plain: Mapping[str, Any]) -> Any:
    """Return a configuration from a checkpoint's plain values. Unknown keys are dropped; missing ones get defaults."""
    return _from_plain(tree, renamed_tree(plain, tree, warn=False))


def _from_plain(tree: type, plain: Mapping[str, Any]) -> Any:
    hints = hints_of(tree)
    values = {}
    for item in fields(tree):
        if item.name in plain:
            kind, value = section_kind(hints[item.name]), plain[item.name]
            values[item.name] = value if kind is None or value is None else _from_plain(kind, value)
    return tree(**values)


def rows() -> Iterator[str]:
    """Yield the lines of the table in docs/checkpoints.md."""
    yield "| key | on a resume | why, or what that means |"
    yield "| --- | --- | --- |"
    for rule in RULES:
        yield f"| {', '.join(f'`{key}`' for key in rule.keys)} | {rule.kind} | {rule.reason} |"


def _tokenizers(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Difference]:
    """Return the keys of two tokenizers that differ. If all keys are equal, the file at tokenizer.path has changed."""
    old, new = before["tokenizer"], now["tokenizer"]
    named = [Difference(f"tokenizer.{key}", old[key], new[key]) for key in ("kind", "path") if old[key] != new[key]]
    return named or [Difference("tokenizer.path", old["path"], new["path"], changed=True)]


def _comparable(plain: Mapping[str, Any], tree: type) -> dict[str, Any]:
    """Return a configuration with today's keys. Sections for which null means the defaults have all of their keys:
    `renamed_tree` drops old defaults of keys that have moved into them."""
    found: dict[str, Any] = renamed_tree(plain, tree, warn=False)
    for section in optional_sections(tree):
        if section.null_is_defaults and _has(found, section.key):
            *parents, name = section.key.split(".")
            holder = found
            for part in parents:
                holder = holder[part]
            holder[name] = {**asdict(section.kind()), **(holder[name] or {})}
    for key, value in BEFORE.items():
        *parents, name = key.split(".")
        if _has(found, parents[0]):
            found[parents[0]].setdefault(name, value)
    return found


def _rule_of(key: str) -> Rule:
    """Return the rule of a key; for an optional section, the rule of its first key."""
    below = (rule for known, rule in TABLE.items() if known.startswith(key + "."))
    return TABLE.get(key) or next(below, _FOREIGN)


def _values(key: str, *plain: Mapping[str, Any]) -> list[Any]:
    return [_value(one, key) for one in plain]


def _critic_of(plain: Mapping[str, Any]) -> str:
    """Return shared, separate or none; none if the advantages need no critic."""
    needs = _needs(plain)
    return str(plain["critic"]["kind"]) if needs.values else "none"


def _needs(plain: Mapping[str, Any]) -> Needs:
    """Return what the advantages of a run need; of a function that is no longer there, nothing."""
    advantages = plain["ppo"].get("advantages", "gae")
    try:
        return needs_of(advantages)
    except ConfigError:
        return Needs()


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
    """Return a key's value, or the value that follows from other keys where null stands for it."""
    value, model = _value(plain, key), plain["model"]
    if value is None and key == "model.num_kv_heads":
        return model["num_heads"]
    if value is None and key == "model.head_dim":
        return model["hidden_size"] // model["num_heads"]
    if value is None and key == "model.ffn_size":
        return 4 * model["hidden_size"]
    if value is None and key == "ppo.whiten_advantages":
        return _needs(plain).whitened
    if value is None and key == "optim.momentum":
        return momentum_in_force(plain["optim"]["kind"], value)
    return value


if __name__ == "__main__":
    sys.stdout.write("\n".join(rows()) + "\n")
