"""Seconds of each phase, from operations, bytes and assumed fractions of the hardware's peaks.

This model compares layouts; it does not predict exactly. docs/planning.md lists what it omits and its accuracy.
"""

from dataclasses import dataclass, field, replace

from megarl.models.flops import (
    adapter_weights,
    flops_per_token,
    forward_flops_per_token,
    layer_weights,
    layers_with_gradients,
    mean_keys,
)
from megarl.parallel.vocab import padded_vocab
from megarl.planning.hardware import Cluster
from megarl.planning.memory import phases_of, slots_of
from megarl.planning.shards import Shard
from megarl.planning.work import Work
from megarl.rollout.generator import Limits

_WITHIN, _BETWEEN = "NVLink", "network"
_SAVED_BYTES_PER_S = 1e9  # write speed of one process to a shared file system


@dataclass
class Phase:
    """One phase of a unit of work (a PPO phase, an SFT step). Bytes are those that a GPU sends, by link."""

    name: str
    seconds: float = 0.0
    tokens: float = 0.0  # over all GPUs
    flops: float = 0.0  # model FLOPs over all GPUs, without recomputation
    sent: dict[str, float] = field(default_factory=lambda: {_WITHIN: 0.0, _BETWEEN: 0.0})
    bound: str = ""  # what takes most of the time

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second over all GPUs; 0 for an empty phase."""
        return self.tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True)
class Rates:
    """Assumptions that a user can override."""

    products: float  # fraction of peak FLOP/s
    host_s_per_layer: float  # host time per layer of a decode pass without CUDA graphs


class Clock:
    """Times of one run on one cluster. Stages are assumed equal, except for the output layer on the last."""

    def __init__(self, work: Work, cluster: Cluster, rates: Rates, shards: list[Shard]) -> None:
        self.work, self.cluster, self.rates = work, cluster, rates
        self.fullest = max(shards, key=lambda shard: shard.trainable)
        self.layout = work.layout
        self.layers = work.model.num_layers / self.layout.pp
        self.tp_span = self.layout.tp
        self.dp_span = self.layout.tp * self.layout.dp if self.layout.dp > 1 else 1

    # --- phases -----------------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        """Return the timed phases of a unit of work; generation and rewards of evaluations are not timed."""
        untimed = {"generate", "reward"} if self.work.evaluates else set()
        return [getattr(self, name)() for name in phases_of(self.work) if name not in untimed]

    def train(self) -> Phase:
        """Estimate the optimizer steps: passes, the pipeline's bubble, and gradient and weight communication."""
        work, layout = self.work, self.layout
        phase = Phase("train")
        forward, backward, again = self._microbatch(phase)
        micro = forward + backward + again
        bubble = 1 + (layout.pp - 1) / layout.vpp / work.accumulation
        computing = micro * work.accumulation * bubble
        sequences = work.steps * work.global_batch
        phase.sent = {link: sent * work.accumulation * work.steps for link, sent in phase.sent.items()}
        reducing, gathering, updating = self._step(phase)
        step = computing + max(0.0, reducing - backward)  # gradients are reduced during the last backward pass
        step += gathering + updating
        phase.seconds = step * work.steps * self._models()
        phase.tokens = sequences * work.length
        phase.flops = (
            (1 + self._backward_share())
            * self._flops(work.length, output=work.loss_tokens)
            * sequences
            * self._models()
        )
        shares = {"products": micro * work.accumulation, "the pipeline's bubble": computing - micro * work.accumulation}
        shares["data-parallel traffic"] = step - computing
        phase.bound = max(shares, key=lambda name: shares[name])
        return phase

    def passes(self) -> tuple[float, float]:
        """Estimate the forward and the backward pass of a microbatch through one stage."""
        forward, backward, again = self._microbatch(Phase("train"))
        return forward, backward + again

    def reward(self) -> Phase:
        """Estimate the reward models' forward passes over the responses."""
        phase = Phase("reward")
        for role in self.work.rewards:
            work = replace(self.work.of(role), loss_tokens=0, roles=(role,))
            one = Clock(work, self.cluster, self.rates, [self.fullest])._forward(1)
            phase.seconds, phase.flops, phase.tokens = phase.seconds + one.seconds, phase.flops + one.flops, one.tokens
            phase.sent = {link: phase.sent[link] + sent for link, sent in one.sent.items()}
            phase.bound = one.bound
        return phase

    def score(self) -> Phase:
        """Estimate a forward pass of every model but reward models over the responses; a reference is copied in and
        out."""
        work = self.work
        phase = self._forward(sum(not role.scores for role in work.roles))
        swapped = sum(not role.on_device and role.has_copy for role in work.roles)
        phase.seconds += swapped * 4 * self.fullest.copy / 20e9  # out, in and back over PCIe, from pageable memory
        return phase

    def _forward(self, passes: int) -> Phase:
        """Estimate forward passes of this model over the responses."""
        work, layout = self.work, self.layout
        phase = Phase("score")
        batches = -(-work.rollouts // (layout.dp * work.micro))
        one = self._pass(work.micro, work.length, phase, backward=False)
        bubble = 1 + (layout.pp - 1) / batches
        phase.seconds = passes * batches * one * bubble
        phase.sent = {link: sent * passes * batches for link, sent in phase.sent.items()}
        phase.tokens = work.rollouts * work.length
        phase.flops = passes * work.rollouts * self._flops(work.length, output=work.loss_tokens)
        phase.bound = "products"
        return phase

    def generate(self) -> Phase:
        """Estimate generation: prompts at the speed of products, then decode passes that read weights and KV cache."""
        if self.work.generating is not self.work:
            return Clock(self.work.generating, self.cluster, self.rates, [self.fullest]).generate()
        work, layout, gpu = self.work, self.layout, self.cluster.gpu
        phase = Phase("generate")
        slots = slots_of(work)
        rows = max(1, slots // layout.pp)
        share = -(-work.rollouts // layout.dp)
        passes = max(work.longest, share / slots * work.response)  # slots are refilled when responses end
        reads = self._decode_bytes(rows) / (gpu.bandwidth * gpu.reads)
        products = rows * self._flops_of_one() / layout.tp / layout.pp / (gpu.flops * self.rates.products)
        sending = 2 * self.layers * self._small_all_reduce(rows, phase)
        device = max(reads, products) + sending
        host = self.layers * self.rates.host_s_per_layer
        one = max(device, host) * layout.pp  # one group of slots per stage, one pass per group and token
        prefill_rows = max(1, min(share, Limits.prefill_tokens // max(1, work.prompt)))
        reading = Phase("prompts")
        prompts = self._pass(prefill_rows, work.prompt, reading, backward=False) * -(-share // prefill_rows)
        phase.sent = {link: sent * passes * layout.pp for link, sent in phase.sent.items()}
        phase.seconds = passes * one + prompts
        phase.tokens = work.rollouts * work.response
        phase.flops = work.rollouts * self._flops(work.prompt + work.response, output=work.response)
        shares = {"launching passes (host)": host - device, "reading weights and cache": reads, "all-reduces": sending}
        phase.bound = max(shares, key=lambda name: shares[name]) if host < device else "launching passes (host)"
        return phase

    def save(self) -> Phase:
        """Estimate a checkpoint, in which ranks write weights, master weights and moments; not part of a unit."""
        stored = 4 * (self.fullest.trainable + self.fullest.moments)
        weights = self.fullest.weights if self.work.adapter is None else self.fullest.copy
        held = (weights + stored) / self.layout.dp * self._models()
        return Phase("save", seconds=held / _SAVED_BYTES_PER_S, bound="writing")

    # --- parts ------------------------------------------------------------------------------------------------------

    def _models(self) -> int:
        """Number of models that train, and so are saved."""
        return sum(role.trains for role in self.work.roles)

    def _flops(self, length: int, output: int) -> float:
        """Return the FLOPs of one sequence's forward pass; the output layer is applied at `output` positions only."""
        model = self.work.model
        head_dim = model.head_width
        attention = 4 * model.num_heads * head_dim * mean_keys(length, model.sliding_window)
        layer = 2 * layer_weights(model) + attention
        products = length * (model.num_layers * layer + self._flops_of_adapters())
        return float(products + output * 2 * model.hidden_size * self.work.vocab_size)

    def _flops_of_adapters(self) -> float:
        """Return the FLOPs of the adapters for one token."""
        model, adapter = self.work.model, self.work.adapter
        if adapter is None:
            return 0.0
        return 2.0 * layers_with_gradients(model, adapter) * adapter_weights(model, adapter)

    def _backward_share(self) -> float:
        """Return the FLOPs of a backward pass over those of a forward pass: 2, and less with adapters, as frozen
        weights need no gradients."""
        work = self.work
        if work.adapter is None:
            return 2.0
        sizes = (work.model, work.vocab_size * work.loss_tokens // work.length, work.length, work.adapter)
        return flops_per_token(*sizes) / forward_flops_per_token(*sizes) - 1

    def _flops_of_one(self) -> float:
        """Return the FLOPs of one new token, without attention over the cache."""
        model = self.work.model
        weights = model.num_layers * layer_weights(model) + model.hidden_size * self.work.vocab_size
        return float(2 * weights + self._flops_of_adapters())

    def _microbatch(self, phase: Phase) -> tuple[float, float, float]:
        """Return the seconds of a microbatch's forward and backward pass and of its recomputation on one stage, and
        add the bytes it sends to the phase."""
        work = self.work
        forward = self._pass(work.micro, work.length, phase, backward=False)
        backward = self._pass(work.micro, work.length, phase, backward=True)
        if work.parallel.recompute != "full":
            return forward, backward, 0.0
        return forward, backward, self._pass(work.micro, work.length, phase, backward=False)

    def _pass(self, rows: int, length: int, phase: Phase, *, backward: bool) -> float:
        """Return the seconds of one microbatch on one stage, and add the bytes it sends to the phase."""
        work, layout, cluster = self.work, self.layout, self.cluster
        flops = rows * self._flops(length, output=min(length, work.loss_tokens)) / layout.tp / layout.pp
        seconds = flops * (self._backward_share() if backward else 1) / (cluster.gpu.flops * self.rates.products)
        whole = rows * length * work.model.hidden_size * work.element
        if layout.tp > 1:
            part = (layout.tp - 1) / layout.tp
            sent = self.layers * 4 * part * whole  # two all-reduces, or as many gathers and scatters
            if backward and layout.sequence_parallel:
                sent += self.layers * 2 * part * whole  # inputs are gathered again in the backward pass
            self._add(phase, self.tp_span, sent)
            # Half of the backward pass's communication overlaps the products for the weight gradients.
            seconds += sent / cluster.speed(self.tp_span) * (0.5 if backward else 1.0)
        if layout.pp > 1:
            split = layout.tp if layout.sequence_parallel else 1
            sent = whole / split * layout.vpp
            span = layout.tp * layout.dp * 2
            self._add(phase, span, sent)
            seconds += sent / cluster.speed(span)
        return seconds

    def _step(self, phase: Phase) -> tuple[float, float, float]:
        """Return the seconds to reduce gradients over replicas, gather updated weights, and update a rank's share."""
        dp, held, gpu = self.layout.dp, self.fullest, self.cluster.gpu
        part = (dp - 1) / dp
        gradients, weights = 4 * held.trainable * part, self.work.element * held.trainable * part
        self._add(phase, self.dp_span, (gradients + weights) * self.work.steps * self._models())
        speed = self.cluster.speed(self.dp_span)
        moved = (
            14 * held.trainable + 8 * held.moments
        )  # bytes read and written: gradient, master weight, weight; moments
        return gradients / speed, weights / speed, moved / dp / (gpu.bandwidth * gpu.reads)

    def _decode_bytes(self, rows: int) -> float:
        """Return the bytes that one stage reads per decode pass: weights, and the keys and
        values of prompts and half-finished responses."""
        work = self.work
        model, layout = work.model, self.layout
        heads = max(1.0, model.kv_heads / layout.tp)
        head_dim = model.head_width
        seen = work.prompt + work.response / 2
        cache = 2 * self.layers * rows * heads * head_dim * seen * work.element
        weights = self.layers * layer_weights(model) / layout.tp
        weights += padded_vocab(work.vocab_size, layout.tp) / layout.tp * model.hidden_size / layout.pp
        return float(cache + weights * work.element)

    def _small_all_reduce(self, rows: int, phase: Phase) -> float:
        tp = self.layout.tp
        if tp == 1:
            return 0.0
        sent = 2 * (tp - 1) / tp * rows * self.work.model.hidden_size * self.work.element
        self._add(phase, self.tp_span, 2 * self.layers * sent)
        slow = self.tp_span > self.cluster.per_node
        return self.cluster.gpu.latency_s * (4 if slow else 1) + sent / self.cluster.speed(self.tp_span)

    def _add(self, phase: Phase, span: int, sent: float) -> None:
        phase.sent[_WITHIN if span <= self.cluster.per_node else _BETWEEN] += sent
