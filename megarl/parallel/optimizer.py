"""AdamW or another update rule in Megatron's distributed optimizer, and the learning-rate schedule."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import distrib_optimizer as mcore_distrib_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config.sections.optim import OptimConfig
from megarl.logging import get_logger
from megarl.parallel.grid import Grid
from megarl.parallel.trained import trained_tensors
from megarl.parallel.update_rules import MOMENTS, RULES, UpdateRule

log = get_logger(__name__)
RESTORED = ("params", "step")  # restored entries of a parameter group; its saved settings are ignored
OF_EXPERTS = "is_expert_parallel"  # entry of a parameter group: whether its weights are experts that replicas share
MULTIPLIERS = ("wd_mult", "lr_mult")  # entries of a parameter group, by which biases and norms have one of their own
STATES = ("param", *MOMENTS)  # state of a trained tensor in a checkpoint: of AdamW, and at most of other kinds


@dataclass(frozen=True)
class OptimSpec:
    """The optimizer's settings, the length of its schedule, and the configuration key that sets the learning rate."""

    settings: OptimConfig
    total_steps: int
    lr_key: str = "optim.lr"


def build_optimizer(chunks: list[Any], spec: OptimSpec, grid: Grid, bf16: bool) -> MegatronOptimizer:
    """Build a ZeRO-1 optimizer over an engine's chunks; biases and norms are not decayed (Megatron's standard rule).

    Megatron accepts no optimizer but Adam. Another kind takes Adam's place, with Adam's shards of the parameters, after
    Megatron has made them and before Adam has any state.
    """
    _make_states_loadable()
    _fill_missing_states()
    _make_states_savable()
    _leave_out_missing_states()
    settings = spec.settings
    config = OptimizerConfig(
        optimizer="adam",
        lr=settings.lr,
        min_lr=settings.lr * settings.min_lr_ratio,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1,
        adam_beta2=settings.beta2,
        adam_eps=settings.eps,
        clip_grad=settings.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
        overlap_param_gather=False,
    )
    optimizer = get_megatron_optimizer(config, chunks, use_gloo_process_groups=False, pg_collection=grid.groups)
    for part in optimizer.chained_optimizers:
        if settings.kind in RULES and not part.is_stub_optimizer:
            tensors = trained_tensors(part, chunks)
            part.optimizer = RULES[settings.kind](_groups_of(part.optimizer), settings, tensors, grid)
        _allocate_state(part)
    return optimizer


def _groups_of(adam: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """Return an Adam's parameter groups without the settings that only Adam has."""
    own = adam.defaults.keys() - {"lr", "weight_decay"}
    return [{key: value for key, value in group.items() if key not in own} for group in adam.param_groups]


def trains_here(optimizer: MegatronOptimizer) -> bool:
    """Return whether this rank updates any parameter: a pipeline stage of frozen layers does not."""
    return any(group["params"] for group in optimizer.param_groups)


def fuse(part: MegatronOptimizer) -> None:
    """On the CPU, switch on torch's fused kernel, for which Megatron has no setting."""
    for group in part.optimizer.param_groups:
        if isinstance(part.optimizer, torch.optim.AdamW) and all(p.device.type == "cpu" for p in group["params"]):
            group["fused"] = True


def load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any] | None, grid: Grid, name: str) -> None:
    """Load master weights, moments and the step count from a checkpoint; all ranks call this together.

    Args:
        saved: this rank's state; None if it trains nothing.
        name: the engine's.
    """
    rules = [part.optimizer for part in _parts(optimizer) if isinstance(part.optimizer, UpdateRule)]
    for rule in rules:
        rule.changed_by_rounding = False
    if saved is not None:
        _load(optimizer, saved)
    if grid.any_rank(any(rule.changed_by_rounding for rule in rules)):
        log.info("the 8-bit moments of %s were rounded again, as the checkpoint was written in another layout", name)


def _load(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Load a rank's state.

    All other entries of a parameter group keep this run's values, because the Adams of torch, Transformer Engine and
    Apex have different entries. Every parameter gets a separate step counter: Megatron loads one tensor into all of
    torch's Adam states, and each of them would then increment it.
    """
    mine = [{key: group[key] for key in group if key not in RESTORED} for group in optimizer.param_groups]
    optimizer.load_state_dict(_arranged(saved, optimizer))
    for group, entries in zip(optimizer.param_groups, mine, strict=True):
        restored = {key: group[key] for key in RESTORED if key in group}
        if "step" in restored:  # torch counts in floats, which the other kernels do not accept
            restored["step"] = int(restored["step"])
        group.clear()
        group.update(restored | entries)
    for part in _parts(optimizer):
        fuse(part)
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _arranged(saved: dict[Any, Any], optimizer: MegatronOptimizer) -> dict[Any, Any]:
    """Return a saved state for this rank's optimizers, which may be others than in the layout that wrote it: where
    replicas share experts Megatron has a second one, with numbers for both."""
    parts: list[Any] = optimizer.chained_optimizers
    numbered = {key: value for key, value in saved.items() if isinstance(key, int)}
    single = {key: value for key, value in saved.items() if key not in numbered}
    states = (single, *numbered.values())
    groups = [group for state in states for group in state.get("optimizer", {}).get("param_groups", [])]

    def of(part: Any, state: dict[Any, Any]) -> dict[Any, Any]:
        if part.is_stub_optimizer:
            return state
        return {**state, "optimizer": {"param_groups": [_saved_of(group, groups) for group in part.param_groups]}}

    if len(parts) == 1:
        return of(parts[0], {**numbered.get(0, {}), **single})
    return {number: of(part, {**single, **numbered.get(number, {})}) for number, part in enumerate(parts)}


def _saved_of(mine: dict[str, Any], groups: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the saved group that fits one of this rank's: with the same multipliers, and of the same kind of weights
    if there is one, as experts that no replica shares have no group of their own.

    It gets what Megatron tells groups apart by from this run, whose learning rate (from 0.19 a part of it) may differ.
    """
    alike = [group for group in groups if all(group[name] == mine[name] for name in MULTIPLIERS)]
    same = [group for group in alike if group[OF_EXPERTS] == mine[OF_EXPERTS]]
    names = mcore_distrib_optimizer.param_group_identifier_keys
    return {**(same or alike)[0], **{name: mine[name] for name in names if name in mine}}


def stored_moments(optimizer: MegatronOptimizer, buffers: Collection[Any] | None = None) -> int:
    """Return how many values a checkpoint has for this rank's slice of the model, besides the weights; with `buffers`,
    only for the weights whose gradients are in these buffers."""
    count = 0
    for part in _parts(optimizer):
        rule = part.optimizer if isinstance(part.optimizer, UpdateRule) else None
        mine = [buffer for buffer in part.buffers if buffers is None or buffer in buffers]
        for parameter in (parameter for buffer in mine for parameter in buffer.param_index_map):
            moments = MOMENTS if rule is None else rule.moments_for(rule.trained[parameter])
            count += len(moments) * parameter.numel()
    return count


def peak_bytes_of_a_step(optimizer: MegatronOptimizer) -> int:
    """Return the most memory that a step needs beside the states, where it is more than a few tensors of this rank."""
    rules = [part.optimizer for part in _parts(optimizer)]
    return max((rule.peak_bytes for rule in rules if isinstance(rule, UpdateRule)), default=0)


def _parts(optimizer: MegatronOptimizer) -> list[Any]:
    """Return Megatron's optimizers of the chunks that train something."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _allocate_state(part: MegatronOptimizer) -> None:
    """Create the state before the first step, so that checkpoints of all steps have the same content."""
    if part.is_stub_optimizer:
        return
    if isinstance(part.optimizer, UpdateRule):
        part.optimizer.allocate()
        return
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
    else:  # Transformer Engine and Apex count per group, from the first step on
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)
    fuse(part)


def build_schedule(optimizer: MegatronOptimizer, spec: OptimSpec) -> OptimizerParamScheduler:
    """Build the schedule: linear warm-up, then constant, linear or cosine decay to min_lr at the last step."""
    settings = spec.settings
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=settings.lr,
        min_lr=settings.lr if settings.schedule == "constant" else settings.lr * settings.min_lr_ratio,
        lr_warmup_steps=min(settings.warmup_steps, max(spec.total_steps - 1, 0)),
        lr_decay_steps=max(spec.total_steps, 1),
        lr_decay_style=settings.schedule,
        start_wd=settings.weight_decay,
        end_wd=settings.weight_decay,
        wd_incr_steps=max(spec.total_steps, 1),
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,  # a resumed run may have more steps
    )


def restore_schedule(schedule: OptimizerParamScheduler, saved: dict[str, Any], name: str) -> None:
    """Continue from the saved step with this run's settings, and warn where they differ from the saved ones."""
    ours = schedule.state_dict()
    keys = ["max_lr", "min_lr", "lr_warmup_steps", "lr_decay_style", "start_wd"]
    if schedule.lr_decay_style != "constant":
        keys.append("lr_decay_steps")
    changed = [f"{key} {saved[key]} -> {ours[key]}" for key in keys if saved[key] != ours[key]]
    if changed:
        log.warning(
            "the optimizer settings of %s differ from the checkpoint's and are used: %s", name, ", ".join(changed)
        )
    schedule.num_steps = 0  # Megatron adds the loaded steps to the present ones
    schedule.load_state_dict(saved)


def _make_states_loadable() -> None:
    """Patch a method of Megatron's distributed optimizer that fails to load a checkpoint into torch's Adam.

    The original walks the keys of its own state (including `step`, which files do not store per parameter) and copies
    into leaves that require grad. The patch copies the keys that both have, without autograd.
    """
    optimizer = mcore_distrib_optimizer.DistributedOptimizer
    original = optimizer._set_main_param_and_optimizer_states
    if getattr(original, "_megarl", False):
        return

    @torch.no_grad()
    def copy_present(self: Any, model_param: Any, tensors: dict[str, Any]) -> None:
        if self.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8:
            original(self, model_param, tensors)
            return
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        if isinstance(self.optimizer, UpdateRule):
            main.copy_(tensors["param"])
            self.optimizer.write(main, tensors)
            return
        targets = {"param": main, **self.optimizer.state[main]}
        for key in targets.keys() & tensors.keys():
            targets[key].copy_(tensors[key])

    copy_present._megarl = True  # type: ignore[attr-defined]
    optimizer._set_main_param_and_optimizer_states = copy_present


def _make_states_savable() -> None:
    """Patch a method of Megatron's distributed optimizer that saves one tensor's state under another's name.

    The original gathers the state of a buffer without the padding between its buckets, but its caller slices tensors
    at their padded offsets. The patch adds the padding again. A single replica has nothing to gather. States that the
    optimizer does not have are left out of checkpoints.
    """
    optimizer = mcore_distrib_optimizer.DistributedOptimizer
    original = optimizer.get_parameter_state_dp_zero
    if getattr(original, "_megarl", False):
        return

    def with_padding(self: Any, *args: Any, **settings: Any) -> Any:
        everywhere = settings.get("return_on_all_ranks")  # other callers expect no padding
        if everywhere and not settings.get("empty_data") and self.data_parallel_group.size() == 1:
            return {number: _own_state(self, number) for number in range(len(self.buffers))}
        state = original(self, *args, **settings)
        if state is None or not everywhere:
            return state
        for number, buffer in enumerate(self.buffers):
            for tensors in state[number].values():
                for key in set(STATES) - set(_states_of(self)):
                    del tensors[key]
                for key in _states_of(self):
                    padded, start = torch.zeros(buffer.numel, dtype=tensors[key].dtype), 0
                    for bucket in buffer.buckets:
                        end = start + bucket.numel_unpadded
                        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = tensors[key][start:end]
                        start = end
                    tensors[key] = padded
        return state

    with_padding._megarl = True  # type: ignore[attr-defined]
    optimizer.get_parameter_state_dp_zero = with_padding


def _fill_missing_states() -> None:
    """Patch a method of Megatron's distributed optimizer, whose callers gather the states of Adam, whatever there is.

    The patch returns float32 moments where they are stored otherwise, and zeros, which take no memory, for the states
    that the optimizer does not have.
    """
    optimizer = mcore_distrib_optimizer.DistributedOptimizer
    original = optimizer._get_main_param_and_optimizer_states
    if getattr(original, "_megarl", False):
        return

    def with_zeros(self: Any, model_param: Any) -> dict[str, torch.Tensor]:
        if isinstance(self.optimizer, UpdateRule):
            group, order = self.model_param_group_index_map[model_param]
            main = self.optimizer.param_groups[group]["params"][order]
            found = {"param": main, **self.optimizer.read(main)}
        else:
            found = original(self, model_param)
        zeros = found["param"].new_zeros(()).expand_as(found["param"])
        return {**dict.fromkeys(STATES, zeros), **found}

    with_zeros._megarl = True  # type: ignore[attr-defined]
    optimizer._get_main_param_and_optimizer_states = with_zeros


def _leave_out_missing_states() -> None:
    """Patch a method of Megatron's distributed optimizer that describes the same states for all saved tensors.

    The patch removes those that an update rule does not have for a tensor.
    """
    optimizer = mcore_distrib_optimizer.DistributedOptimizer
    original = optimizer.sharded_param_state_fully_reshardable
    if getattr(original, "_megarl", False):
        return

    def without_missing(self: Any, *args: Any, **settings: Any) -> Any:
        state = original(self, *args, **settings)
        if isinstance(self.optimizer, UpdateRule):
            parameters = [parameter for buffer in self.buffers for parameter in buffer.param_index_map]
            for number, parameter in enumerate(parameters):
                kept = ("param", *self.optimizer.moments_for(self.optimizer.trained[parameter]))
                state[number] = {key: tensor for key, tensor in state[number].items() if key in kept}
        return state

    without_missing._megarl = True  # type: ignore[attr-defined]
    optimizer.sharded_param_state_fully_reshardable = without_missing


def _states_of(optimizer: Any) -> tuple[str, ...]:
    """Return the states of a trained tensor that one of Megatron's distributed optimizers stores in a checkpoint."""
    inner = optimizer.optimizer
    return ("param", *inner.moments) if isinstance(inner, UpdateRule) else STATES


def _own_state(optimizer: Any, number: int) -> dict[Any, dict[str, torch.Tensor]]:
    """Return, by dtype, a single replica's state of buffer `number`, at the buffer's offsets, with its padding."""
    found, names = {}, _states_of(optimizer)
    for dtype, buckets in optimizer.gbuf_ranges[number].items():
        found[dtype] = {key: torch.empty(optimizer.buffers[number].numel) for key in names}
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            span = slice(ranges["gbuf_world"].start, ranges["gbuf_world"].end)
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            for key in names:
                found[dtype][key][span] = state[key].detach()
    return found
