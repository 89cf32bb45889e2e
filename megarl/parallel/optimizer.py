"""AdamW through Megatron's distributed optimizer, and its schedule."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer import distrib_optimizer as mcore_distrib_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megarl.config.schema import OptimConfig
from megarl.logging import get_logger
from megarl.parallel.grid import Grid

log = get_logger(__name__)
RESTORED = ("params", "step")  # of a group of parameters; checkpoints hold its settings too
STATES = ("param", "exp_avg", "exp_avg_sq")  # what a checkpoint holds of a tensor that trains


@dataclass(frozen=True)
class OptimSpec:
    """What an engine needs to know to train: the optimizer's settings, the length of its schedule, and which key of the
    configuration the learning rate is of."""

    settings: OptimConfig
    total_steps: int
    lr_key: str = "optim.lr"


def build_optimizer(chunks: list[Any], spec: OptimSpec, grid: Grid, bf16: bool) -> MegatronOptimizer:
    """ZeRO-1 AdamW over an engine's chunks; biases and norms are not decayed (Megatron's standard rule)."""
    _make_states_loadable()
    _make_states_savable()
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
        _allocate_state(part)
    return optimizer


def trains_here(optimizer: MegatronOptimizer) -> bool:
    """Whether this rank updates any parameter: a stage of frozen layers does not."""
    return any(group["params"] for group in optimizer.param_groups)


def fuse(part: MegatronOptimizer) -> None:
    """On the CPU, update a tensor in one pass: Megatron has no setting for torch's fused kernel."""
    for group in part.optimizer.param_groups:
        if isinstance(part.optimizer, torch.optim.AdamW) and all(p.device.type == "cpu" for p in group["params"]):
            group["fused"] = True


def load_optimizer(optimizer: MegatronOptimizer, saved: dict[str, Any]) -> None:
    """Take master weights, moments and the number of steps from a checkpoint.

    All else that a group holds is this run's and this machine's: the Adams of torch, Transformer Engine and Apex do not
    have the same entries. Every parameter gets a step counter of its own (Megatron loads one tensor into all of torch's
    Adam states, which then each count it up).
    """
    mine = [{key: group[key] for key in group if key not in RESTORED} for group in optimizer.param_groups]
    optimizer.load_state_dict(saved)
    for group, entries in zip(optimizer.param_groups, mine, strict=True):
        restored = {key: group[key] for key in RESTORED if key in group}
        if "step" in restored:  # torch counts in floats, which the kernels of the others do not take
            restored["step"] = int(restored["step"])
        group.clear()
        group.update(restored | entries)
    for part in optimizer.chained_optimizers:
        if part.is_stub_optimizer:
            continue
        fuse(part)
        for state in part.optimizer.state.values():
            if isinstance(state.get("step"), torch.Tensor):
                state["step"] = state["step"].clone()


def _allocate_state(part: MegatronOptimizer) -> None:
    """Make Adam's state before the first step, so that a checkpoint of any step has the same content."""
    if part.is_stub_optimizer:
        return
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.AdamW):
        for state in part.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))
    else:  # Transformer Engine's and Apex's count in groups, from the first step on
        for group in part.optimizer.param_groups:
            group.setdefault("step", 0)
    fuse(part)


def build_schedule(optimizer: MegatronOptimizer, spec: OptimSpec) -> OptimizerParamScheduler:
    """Linear warm-up, then constant, linear or cosine down to min_lr at the last step."""
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
        override_opt_param_scheduler=True,  # a resumed run may be told to go on for longer
    )


def restore_schedule(schedule: OptimizerParamScheduler, saved: dict[str, Any], name: str) -> None:
    """Go on from the saved step by this run's settings, which may be others: that is said."""
    ours = schedule.state_dict()
    keys = ["max_lr", "min_lr", "lr_warmup_steps", "lr_decay_style", "start_wd"]
    if schedule.lr_decay_style != "constant":
        keys.append("lr_decay_steps")
    changed = [f"{key} {saved[key]} -> {ours[key]}" for key in keys if saved[key] != ours[key]]
    if changed:
        log.warning("the optimizer of %s goes on by other settings than the checkpoint's: %s", name, ", ".join(changed))
    schedule.num_steps = 0  # Megatron adds the steps it reads to those it has
    schedule.load_state_dict(saved)


def _make_states_loadable() -> None:
    """Replace one method of Megatron's distributed optimizer that cannot load a checkpoint with torch's own Adam.

    It walks the keys of its own state (`step` among them, which files do not carry per parameter) and copies into
    leaves that require grad. This version copies what both sides have, without autograd.
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
        targets = {"param": main, **self.optimizer.state[main]}
        for key in targets.keys() & tensors.keys():
            targets[key].copy_(tensors[key])

    copy_present._megarl = True  # type: ignore[attr-defined]
    optimizer._set_main_param_and_optimizer_states = copy_present


def _make_states_savable() -> None:
    """Mend a method of Megatron's distributed optimizer that saves one tensor's state under another's name.

    It gathers the state of a buffer without the padding between its buckets, and its caller cuts tensors out of that
    where they lie with the padding. This version puts the padding back. A lone replica has nothing to gather.
    """
    optimizer = mcore_distrib_optimizer.DistributedOptimizer
    original = optimizer.get_parameter_state_dp_zero
    if getattr(original, "_megarl", False):
        return

    def with_padding(self: Any, *args: Any, **settings: Any) -> Any:
        everywhere = settings.get("return_on_all_ranks")  # other callers want it without padding
        if everywhere and not settings.get("empty_data") and self.data_parallel_group.size() == 1:
            return {number: _own_state(self, number) for number in range(len(self.buffers))}
        state = original(self, *args, **settings)
        if state is None or not everywhere:
            return state
        for number, buffer in enumerate(self.buffers):
            for tensors in state[number].values():
                for key in STATES:
                    padded, start = torch.zeros(buffer.numel, dtype=tensors[key].dtype), 0
                    for bucket in buffer.buckets:
                        end = start + bucket.numel_unpadded
                        padded[bucket.offset : bucket.offset + bucket.numel_unpadded] = tensors[key][start:end]
                        start = end
                    tensors[key] = padded
        return state

    with_padding._megarl = True  # type: ignore[attr-defined]
    optimizer.get_parameter_state_dp_zero = with_padding


def _own_state(optimizer: Any, number: int) -> dict[Any, dict[str, torch.Tensor]]:
    """By dtype, the state of everything in one of a lone replica's buffers, where it lies in the buffer."""
    found = {}
    for dtype, buckets in optimizer.gbuf_ranges[number].items():
        found[dtype] = {key: torch.empty(optimizer.buffers[number].numel) for key in STATES}
        for parameter, ranges in (item for bucket in buckets for item in bucket["param_map"].items()):
            place = slice(ranges["gbuf_world"].start, ranges["gbuf_world"].end)
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            for key in STATES:
                found[dtype][key][place] = state[key].detach()
    return found
