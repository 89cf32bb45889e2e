"""Device memory of every rank by phase and purpose, and host memory, in bytes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from megarl.config.mixtures import refuse_moved
from megarl.models.cache import KVCache
from megarl.models.config import GPTConfig
from megarl.models.roles import Role
from megarl.parallel.reshard import refuse_what_cannot_be_moved
from megarl.parallel.update_rules import MOMENTS
from megarl.parallel.vocab import padded_vocab
from megarl.planning import activations as act
from megarl.planning.activations import Shape
from megarl.planning.parts import Part, parts_of, stages_that_differ, trained_parts
from megarl.planning.shards import Shard, gpt_config, shard
from megarl.planning.work import Work
from megarl.rollout.generator import Limits
from megarl.rollout.resharded import check_divides

PHASES = ("generate", "reward", "score", "train", "save")
GENERATOR = "generator"  # the policy's copy in `rollout.engine.layout`
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "cache")
PROCESS = 4 * 2**30  # of host memory: Python, torch, CUDA's libraries and their buffers, before any model
BUCKET_ELEMENTS = 40_000_000  # minimum number of elements of Megatron's gradient buckets
_INPUTS = 80  # bytes per token of a microbatch: 36 for inputs and targets, 44 for rows and their columns
_SAMPLING = {"gpu": 20, "cpu": 14}  # peak bytes per logit while a token is sampled
_MASKING = 5  # and where another model masks tokens: a byte for each, and a copy of the logits


@dataclass(frozen=True)
class Use:
    """Bytes of one role on one rank in one phase."""

    role: str
    weights: float = 0
    gradients: float = 0
    optimizer: float = 0
    activations: float = 0
    logits: float = 0
    cache: float = 0
    host: float = 0

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return float(sum(getattr(self, part) for part in PARTS))


@dataclass(frozen=True)
class RankPlan:
    """One pipeline stage's ranks: all its tensor-, context- and data-parallel ranks have the same sizes."""

    stage: int
    shards: dict[str, Shard]
    uses: dict[str, list[Use]] = field(default_factory=dict)  # by phase

    def total(self, phase: str) -> float:
        """Return the device bytes of a phase, over all roles."""
        return sum(use.total for use in self.uses[phase])

    def host(self, phase: str) -> float:
        """Return the host bytes of a phase, including those of the process itself."""
        return PROCESS + sum(use.host for use in self.uses[phase])

    def part(self, phase: str, part: str) -> float:
        """Return the bytes of one field of `Use` in a phase, over all roles."""
        return float(sum(getattr(use, part) for use in self.uses[phase]))

    @property
    def peak(self) -> str:
        """The phase that needs the most memory."""
        return max(self.uses, key=self.total)


def phases_of(work: Work) -> tuple[str, ...]:
    """Return the phases in order: `reward` if a reward model scores responses, `score` if the other models compute
    log-probs and values of them before training."""
    there = {
        "generate": work.generates,
        "reward": work.generates and bool(work.rewards),
        "score": work.rescored,
        "train": True,
        "save": True,
    }
    return tuple(phase for phase in PHASES if there[phase])


def plan_ranks(work: Work, *, on_cpu: bool = False, every_stage: bool = False, exact: bool = True) -> list[RankPlan]:
    """Plan one rank of each kind of stage (or of every stage)."""
    stages = range(work.layout.pp) if every_stage else stages_that_differ(work.layout, work.model)
    return [plan_stage(work, stage, on_cpu=on_cpu, exact=exact) for stage in stages]


def plan_stage(work: Work, stage: int, *, on_cpu: bool = False, exact: bool = True) -> RankPlan:
    """Plan the memory of a pipeline stage's ranks in every phase. Not `exact`: with few experts built (`shard`)."""
    shards = {role.name: shard(work, role, stage, exact=exact) for role in work.engines}
    plan = RankPlan(stage, shards)
    for phase in phases_of(work):
        plan.uses[phase] = _in_turn([_use(work, role, shards, stage, phase, on_cpu=on_cpu) for role in work.roles])
    if "generate" in plan.uses:
        _add_generation(plan, work, on_cpu=on_cpu)
    return plan


def _in_turn(uses: list[Use]) -> list[Use]:
    """Engines run one after the other: only the largest temporary memory counts."""
    busiest = max(uses, key=lambda use: use.activations + use.logits)
    return [use if use is busiest else replace(use, activations=0, logits=0) for use in uses]


def _add_generation(plan: RankPlan, work: Work, *, on_cpu: bool) -> None:
    """Add the cache, the passes over it, and the second copy of the policy with `rollout.engine.layout` as a role."""
    there, stage, name = work.generating, plan.stage, work.engines[0].name
    Limits(graphs=work.cuda_graphs).check(there.layout, has_experts=work.model.experts is not None)
    moved = work.moves_weights
    if moved:
        refuse_moved(work.rollout_layout, work.layout.ep)
        check_divides(gpt_config(work), there.layout, str(work.rollout_layout))
        refuse_what_cannot_be_moved(work.layout, there.layout, tied=work.model.tie_embeddings)
        copy = replace(work.engines[0], optim=None)
        parts = {at: shard(there, copy, at) for at in _stages_there(work, there, stage)}
        stage, name = max(parts, key=lambda at: parts[at].weights), GENERATOR
        plan.shards[name] = parts[stage]
    held = plan.shards[name]
    passing, logits, cache = _generating(there, held, stage, on_cpu=on_cpu)
    kept = cache if work.cuda_graphs else 0.0  # graphs contain its addresses; without graphs it is freed after each use
    if moved:  # weights use receive and send buffers; the cache is allocated afterwards
        passing = max(passing, 2 * held.weights + kept - cache - logits)
    for phase, uses in plan.uses.items():
        if moved:
            uses.append(Use(name, weights=held.weights))
        at = next(number for number, use in enumerate(uses) if use.role == name)
        weights = uses[at].weights + held.merged  # adapters are merged into the weights, which are kept besides
        uses[at] = (
            replace(uses[at], weights=weights, activations=passing, logits=logits, cache=cache)
            if phase == "generate"
            else replace(uses[at], cache=kept)
        )


def _stages_there(work: Work, there: Work, stage: int) -> range:
    """Return the stages of the generation layout on the ranks of a stage; in both layouts stages vary slowest."""
    ranks, theirs = (layout.tp * layout.copies for layout in (work.layout, there.layout))
    return range(stage * ranks // theirs, ((stage + 1) * ranks - 1) // theirs + 1)


def _use(work: Work, role: Role, shards: dict[str, Shard], stage: int, phase: str, *, on_cpu: bool) -> Use:
    if role.swaps_with is not None:
        if not role.has_copy:
            return Use(role.name)
        # Its values are copied in and the other role's out, so there are two copies during its forward passes.
        copies = 2 if phase == "score" else 1
        return Use(role.name, host=copies * shards[role.swaps_with].copy)
    held, work = shards[role.name], work.of(role)
    passing, logits, host = 0.0, 0.0, 0.0
    if phase == ("reward" if role.scores else "score"):
        passing, logits = _scoring(work, role, stage, on_cpu=on_cpu)
    elif phase == "train" and role.trains:
        passing, logits = _training(work, role, held, stage, on_cpu=on_cpu)
    elif phase == "save" and role.saved:
        passing, host = _saving(work, role, held, stage, on_cpu=on_cpu)
    use = Use(role.name, held.weights, held.gradients, held.optimizer, passing, logits, host=host)
    return _offloaded(use, work, role, phase) if work.offloads else use


def _offloaded(use: Use, work: Work, role: Role, phase: str) -> Use:
    """Return the memory of a role with `parallel.offload`.

    While a model generates or gives rewards, it is alone on the device, without its optimizer; a model that masks its
    tokens is there, too. The optimizer comes back
    when training begins, and a reward model only for the next responses. Several reward models give rewards one after
    the other, but are all counted. Host memory that was needed once is kept.
    """
    is_policy = role is work.roles[0]
    on_device = {"generate": is_policy or role.follows, "reward": role.scores}.get(phase, not role.scores)
    leaves = not is_policy or bool(work.rewards)  # the policy's weights make room for the reward model
    host = use.host + use.optimizer + (use.weights if leaves else 0.0)
    if phase not in ("train", "save"):
        use = replace(use, gradients=0.0, optimizer=0.0)
    return replace(use, weights=use.weights if on_device else 0.0, host=host)


def _shape(work: Work, *, on_cpu: bool, gathered: bool = True) -> Shape:
    layout = work.layout
    if not gathered:  # generation runs without sequence parallelism
        layout = replace(layout, sequence_parallel=False)
    return Shape.of(gpt_config(work), layout, work.element, on_cpu=on_cpu)


def in_flight(work: Work, stage: int) -> float:
    """Return how many microbatches a stage keeps activations of, in units of all its layers (1F1B or interleaved)."""
    pp, vpp = work.layout.pp, work.layout.vpp
    if vpp > 1:
        chunks = min((pp - stage - 1) * 2 + (vpp - 1) * pp + 1, work.accumulation * vpp)
        return chunks / vpp
    return float(min(pp - stage, work.accumulation))


def _training(work: Work, role: Role, held: Shard, stage: int, *, on_cpu: bool) -> tuple[float, float]:
    """Return activations and logits at the peak of a step, when the backward pass of a microbatch has just begun."""
    config, shape = gpt_config(work), _shape(work, on_cpu=on_cpu)
    recompute = work.parallel.recompute
    tokens, own = work.micro * sum(work.computed), work.micro * work.computed[1]
    parts = trained_parts(work, stage)
    trained = sum(part.trained for part in parts)  # frozen layers keep no activations
    layers = sum(part.trained * act.kept_by_layer(config, shape, part.at, recompute) for part in parts)
    layers += sum(act.kept_besides_layers(config, shape, part, recompute) for part in parts)
    if work.adapter is not None and recompute != "full" and stage == 0 and trained:
        layers -= act.not_kept_by_first(config, shape, next(part.at for part in parts if part.trained))
    layers += tokens * shape.rotary * 2 * shape.element
    last = stage == work.layout.pp - 1
    kept = in_flight(work, stage) * layers
    kept += work.accumulation * work.micro * work.length * _INPUTS  # whole sequences on every rank
    once = [(part.trained, act.kept_once_by_adapters(config, work.layout, shape, part.at)) for part in parts]
    kept += (
        in_flight(work, stage) * sum(layers * one for layers, one in once)
        if recompute != "full"
        else max(one for _, one in once)
    )
    if work.layout.pp > 1:
        kept += 2 * tokens * shape.hidden * shape.element  # received from neighbouring stages
    rows = work.micro * work.most_targets
    logits = 0.0
    passing = max(_passing_backward(config, shape, part, recompute) for part in parts)
    passing += act.dequantised_chunk(config, shape)
    if not on_cpu:  # a weight's gradient before it is added to its buffer
        passing += held.largest * shape.element
    if last:
        kept += tokens * act.kept_by_norm(config, shape)
        kept += own * shape.whole * shape.element if shape.gathered else 0.0
        if "value" in role.heads:
            kept += own * (2 * shape.whole * shape.element + 8)
        if "lm" in role.heads:
            kept += rows * (shape.whole * shape.element + 16)
            logits = act.vocabulary(
                config, shape, work.layout, rows, backward=True, entropy=work.entropy, width=shape.whole
            )
        if "q" in role.heads:
            kept += 2 * role.heads.count("q") * rows * 2 * shape.whole * shape.element
            logits = act.vocabulary(
                config, shape, work.layout, rows, backward=True, entropy=False, width=2 * shape.whole
            )
        # The backward pass of the output layer precedes that of the layers.
        passing = max(0.0, passing - logits)
    # The optimizer runs after all that is freed: AdamW is fused, Muon joins whole matrices, and the others allocate one
    # tensor at a time.
    return max(kept + passing, held.stepping - logits), logits


def _passing_backward(config: GPTConfig, shape: Shape, part: Part, recompute: str) -> float:
    """Return the peak bytes of the backward pass of one layer in addition to what is kept. With full recomputation, it
    has all that it would have kept."""
    again = 0.0
    if recompute == "full":
        again = act.kept_by_layer(config, shape, part.at, "none") - act.kept_by_layer(config, shape, part.at, "full")
    return act.passing_backward(config, shape, part.at, recompute) + again


def _scoring(work: Work, role: Role, stage: int, *, on_cpu: bool) -> tuple[float, float]:
    """Return activations and logits while log-probs and values of responses are computed, without gradients."""
    config, shape = gpt_config(work), _shape(work, on_cpu=on_cpu)
    tokens, rows = work.micro * sum(work.computed), work.micro * work.most_targets
    parts = trained_parts(work, stage)
    passing = _passing_forward(config, shape, parts) + tokens * shape.rotary * 2 * shape.element
    passing += work.micro * work.length * _INPUTS * -(-work.rollouts // (work.layout.dp * work.micro))
    logits = 0.0
    if stage == work.layout.pp - 1 and "lm" in role.heads:
        logits = act.vocabulary(
            config, shape, work.layout, rows, backward=False, entropy=work.entropy, width=shape.whole
        )
        states = tokens + (work.micro * work.computed[1] if shape.gathered else 0)
        head = (states + rows) * shape.whole * shape.element
        passing = max(passing, head + logits) - logits
    return passing, logits


def _passing_forward(config: GPTConfig, shape: Shape, parts: Sequence[Part], *, merged: bool = False) -> float:
    """Return the peak bytes of a forward pass that keeps nothing; `merged`: adapters are in the weights."""
    frozen = max(act.passing_forward(config, shape, part.at, adapters=False) for part in parts)
    frozen += act.dequantised_chunk(config, shape)
    return frozen if merged else max(frozen, *(act.passing_forward(config, shape, part.at) for part in parts))


def _generating(work: Work, held: Shard, stage: int, *, on_cpu: bool) -> tuple[float, float, float]:
    """Return activations of a pass over prompts, logits of a decode pass, and the KV cache."""
    config, shape = gpt_config(work), _shape(work, on_cpu=on_cpu, gathered=False)
    slots = slots_of(work)
    length = work.prompt + work.longest
    parts = prompt_parts(work, stage, slots)
    cached = sum(part.layers for part in parts if not part.is_encoder)
    cache = slots * _slot_bytes(work, config, cached, length)
    passing = _passing_forward(config, shape, parts, merged=bool(held.merged))
    passing += parts[0].at.whole * (shape.rotary * 2 * shape.element + _INPUTS)
    rows = -(-slots // work.layout.pp)
    if config.num_kv_heads != config.num_attention_heads and not on_cpu:
        # With a mask, torch's kernels need a key and a value per query head, so those of one layer are repeated.
        passing = max(passing, 2 * rows * length * shape.queries * shape.element)
    logits = 0.0
    if stage == work.layout.pp - 1:
        columns = padded_vocab(config.vocab_size, work.layout.tp) // work.layout.tp
        narrow = shape.element if shape.element < 4 else 0
        q_heads = work.engines[0].heads.count("q")
        guiding = 4 * (1 + q_heads) if q_heads else 0  # their values, and the sampling scores
        masking = work.masks * _MASKING
        logits = float(rows * columns * (_SAMPLING["cpu" if on_cpu else "gpu"] + narrow + guiding + masking))
    return max(0.0, passing - logits), logits, cache


def prompt_parts(work: Work, stage: int, slots: int) -> tuple[Part, ...]:
    """Return the kinds of layers of a stage with the positions of a pass over prompts. An encoder reads each whole."""
    if work.model.encoder is None:
        return parts_of(work, stage, 1, (0, min(Limits.prefill_tokens, slots * work.prompt)))
    rows = max(1, min(Limits.prefill_tokens // max(1, work.prompt), slots))
    return parts_of(work, stage, rows, (work.prompt, 0))


def slots_of(work: Work) -> int:
    """Return the responses in flight per replica, for which the cache is allocated."""
    groups = work.layout.pp
    share = -(-work.rollouts // work.layout.dp) if work.rollouts else work.slots  # evaluation prompts are not counted
    per_group = max(1, -(-min(work.slots, share) // groups))
    if work.cache_bytes is not None:
        config = gpt_config(work)
        layers = KVCache.most_layers(config, groups)
        slot = _slot_bytes(work, config, layers, work.prompt + work.longest)
        per_group = max(1, min(per_group, work.cache_bytes // slot // groups))
    return per_group * groups


def _slot_bytes(work: Work, config: GPTConfig, layers: int, length: int) -> int:
    """Return the bytes of a slot for `length` tokens on a rank with `layers` layers, in the caches of all models."""
    of_policy = KVCache.slot_bytes(config, layers, work.layout.tp, length, records_routes=work.records_routes)
    return of_policy + work.masks * KVCache.slot_bytes(config, layers, work.layout.tp, length)


def _saving(work: Work, role: Role, held: Shard, stage: int, *, on_cpu: bool) -> tuple[float, float]:
    """Return device bytes of one gathered bucket of optimizer state, and host bytes of master weights and moments."""
    layout, shared = work.layout, held.experts
    # Files lack the weights beside adapters.
    file = held.distributed("weights", layout) if role.adapter is None else held.copy / layout.copies
    file += 4 * (held.distributed("trainable", layout) + held.distributed("moments", layout))
    common = (held.trainable - shared.trainable, held.moments - shared.moments, held.bucket)
    kinds = [(layout.copies, *common), (layout.copies // layout.ep, shared.trainable, shared.moments, shared.bucket)]
    gathered, host = 0.0, file
    for replicas, trainable, moments, bucket in kinds:
        # Megatron gathers as many tensors as Adam has; a single replica gathers nothing.
        host += 4 * (trainable * (1 + len(MOMENTS)) if replicas > 1 else trainable + moments)
        # It splits the first stage's gradients into buckets to overlap their reduction, but not later stages'.
        pieces = stage == 0 and not on_cpu
        size = 4 * (min(trainable, max(BUCKET_ELEMENTS, held.largest)) if pieces else bucket)
        # This rank's slice exists twice: the float32 copy that is sent, and within the gathered result.
        gathered = max(gathered, size * (1 + 1 / replicas) if not on_cpu else 0.0)
        host += size * (2 + 3 / replicas) if on_cpu else 0.0
    return gathered, float(host)
