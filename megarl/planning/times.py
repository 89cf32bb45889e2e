"""Seconds of each phase, from operations, bytes and assumed fractions of the hardware's peaks.

This model compares layouts; it does not predict exactly. docs/planning.md lists what it omits and its accuracy.
"""

from dataclasses import dataclass, field, fields, replace

from megarl.models.flops import (
    adapter_weights,
    cross_weights,
    expert_layers,
    expert_weights,
    flops_of_factors,
    flops_of_parts,
    flops_per_token,
    forward_flops_per_token,
    layers_with_gradients,
    weights_of_layers,
)
from megarl.parallel.vocab import padded_vocab
from megarl.planning.hardware import Cluster
from megarl.planning.memory import phases_of, slots_of
from megarl.planning.shards import Shard
from megarl.planning.work import Work
from megarl.rollout.generator import Limits

_WITHIN, _BETWEEN = "NVLink", "network"
_SAVED_BYTES_PER_S = 1e9  # write speed of one process to a shared file system
_LAUNCHES_OF_EXPERT = 0.25  # of those of a whole layer: two products and an activation of one expert after the other


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


@dataclass(frozen=True)
class Load:
    """What a pipeline stage computes and exchanges for one sequence.

    Attributes:
        forward, backward: FLOPs of the passes, before they are split over tensor- and context-parallel ranks.
        summed: positions whose states a forward pass sums over tensor-parallel ranks, and a backward pass their
            gradients, over all layers.
        gathered: positions that are gathered again in the backward pass under sequence parallelism.
        shared: positions of which only the gradients are summed, as several ranks read one state and sum nothing.
    """

    forward: float
    backward: float
    summed: float
    gathered: float
    shared: float = 0.0


class Clock:
    """Times of one run on one cluster. Stages are assumed equal, except for the output layer on the last; of an
    encoder-decoder with a stage for each part, the slower stage counts."""

    def __init__(self, work: Work, cluster: Cluster, rates: Rates, shards: list[Shard]) -> None:
        self.work, self.cluster, self.rates = work, cluster, rates
        self.fullest = max(shards, key=lambda shard: shard.trainable)
        self.layout = work.layout
        # Layers of a decode pass on a stage. An encoder's run over prompts alone; the decoder's are on one stage.
        self.layers = work.model.num_layers / (1 if work.model.encoder is not None else self.layout.pp)
        self.tp_span = self.layout.tp
        self.cp_span = self.layout.tp * self.layout.cp
        self.dp_span = self.layout.tp * self.layout.copies if self.layout.copies > 1 else 1
        self.expert_layers = expert_layers(work.model) / self.layout.pp  # on a stage
        self.experts = work.model.experts.count or 0 if work.model.experts is not None else 0

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
        phase.flops = sum(self._flops(work.read, work.loss_tokens)) * sequences * self._models()
        shares = {
            self._mostly(): micro * work.accumulation,
            "the pipeline's bubble": computing - micro * work.accumulation,
        }
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
        one = self._pass(work.micro, work.read, phase, backward=False)
        bubble = 1 + (layout.pp - 1) / batches
        phase.seconds = passes * batches * one * bubble
        phase.sent = {link: sent * passes * batches for link, sent in phase.sent.items()}
        phase.tokens = work.rollouts * work.length
        phase.flops = passes * work.rollouts * self._flops(work.read, work.loss_tokens)[0]
        phase.bound = self._mostly()
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
        sending = self._sums_per_layer * self.layers * self._small_all_reduce(rows, phase)
        sending += self._small_exchange(rows, phase)
        device = max(reads, products) + sending
        host = self.layers * self.rates.host_s_per_layer + self._launching(self.expert_layers)
        one = max(device, host) * layout.pp  # one group of slots per stage, one pass per group and token
        read_once, prompts = self._prompts(share)
        phase.sent = {link: sent * passes * layout.pp for link, sent in phase.sent.items()}
        phase.seconds = passes * one + prompts
        phase.tokens = work.rollouts * work.response
        phase.flops = self._generated_flops(read_once * layout.dp)
        shares = {"launching passes (host)": host - device, "reading weights and cache": reads, self._sending: sending}
        phase.bound = max(shares, key=lambda name: shares[name]) if host < device else "launching passes (host)"
        return phase

    def _prompts(self, share: int) -> tuple[int, float]:
        """Return how many prompts a replica reads for its `share` of responses, and the seconds of that. An encoder
        reads a prompt once for all samples of a replica."""
        work = self.work
        has_encoder = work.model.encoder is not None
        reads = min(share, -(-work.rollouts // work.per_prompt)) if has_encoder else share
        rows = max(1, min(reads, Limits.prefill_tokens // max(1, work.prompt)))
        read = (work.prompt, 0) if has_encoder else (0, work.prompt)
        return reads, self._pass(rows, read, Phase("prompts"), backward=False) * -(-reads // rows)

    def _generated_flops(self, reads: int) -> float:
        """Return the FLOPs of all responses, of an encoder-decoder to `reads` prompts that are read once each."""
        work = self.work
        if work.model.encoder is None:
            return work.rollouts * self._flops((0, work.prompt + work.response), work.response)[0]
        reading = self._flops((work.prompt, 0), 0)[0]
        whole = self._flops((work.prompt, work.response), work.response)[0]
        return reads * reading + work.rollouts * (whole - reading)

    def save(self) -> Phase:
        """Estimate a checkpoint, in which ranks write weights, master weights and moments; not part of a unit."""
        held, layout = self.fullest, self.layout
        stored = 4 * (held.distributed("trainable", layout) + held.distributed("moments", layout))
        weights = held.distributed("weights", layout) if self.work.adapter is None else held.copy / layout.copies
        return Phase("save", seconds=(weights + stored) * self._models() / _SAVED_BYTES_PER_S, bound="writing")

    # --- parts ------------------------------------------------------------------------------------------------------

    def _models(self) -> int:
        """Number of models that train, and so are saved."""
        return sum(role.trains for role in self.work.roles)

    def _flops(self, read: tuple[int, int], output: int) -> tuple[float, float]:
        """Return the FLOPs of one sequence's forward pass and of its backward pass, over all stages; see `_loads`."""
        parts = self._flops_of_parts(read, output)
        return sum(forward for forward, _ in parts), sum(backward for _, backward in parts)

    def _flops_of_parts(self, read: tuple[int, int], output: int) -> list[tuple[float, float]]:
        """Return the FLOPs of a forward and of a backward pass, of an encoder-decoder for each part. Frozen weights
        need no gradients.

        Args:
            read: positions of a sequence in an encoder, and in the decoder or the model's only layers.
            output: number of the latter to which the output layer is applied.
        """
        work, (encoder, length) = self.work, read
        columns = work.vocab_size * output / max(1, length)  # of an output layer that is applied everywhere
        if work.model.encoder is not None:
            parts = flops_of_parts(work.model, columns, encoder, length, work.adapter)
            return [(forward, both - forward) for forward, both in parts]
        sizes = (work.model, columns, length, work.adapter)
        forward, both = length * forward_flops_per_token(*sizes), length * flops_per_token(*sizes)
        return [(forward, both - forward)]

    def _loads(self, read: tuple[int, int], output: int) -> list[Load]:
        """Return what the stages that differ compute and exchange for one sequence; of equal stages, one."""
        model, pp, (encoder, length) = self.work.model, self.layout.pp, read
        parts = self._flops_of_parts(read, output)
        if model.encoder is None:
            # A layer with experts gathers their tokens once. A shared expert's are gathered and summed besides.
            (forward, backward), summed = parts[0], 2 * model.num_layers * length
            shared = self._shared_experts * length
            gathered = summed - expert_layers(model) * length + shared
            return [Load(forward / pp, backward / pp, (summed + shared) / pp, gathered / pp)]
        summed, shared = 2 * model.encoder_layers * encoder, model.num_layers * encoder
        first = Load(*parts[0], summed, summed)
        summed = 3 * model.num_layers * length
        last = Load(*parts[1], summed, summed + shared, shared)
        if pp > 1:
            return [first, last]
        return [Load(*(getattr(first, one.name) + getattr(last, one.name) for one in fields(Load)))]

    def _flops_of_adapters(self) -> float:
        """Return the FLOPs of the adapters for one new token."""
        model, adapter = self.work.model, self.work.adapter
        if adapter is None:
            return 0.0
        if model.encoder is not None:
            return min(layers_with_gradients(model, adapter), model.num_layers) * flops_of_factors(
                model, adapter, "decoder", 0, 1
            )
        return 2.0 * adapter_weights(model, adapter)

    def _flops_of_one(self) -> float:
        """Return the FLOPs of one new token, without attention over the cache."""
        model = self.work.model
        weights = self._weights_of_decoding + model.hidden_size * self.work.vocab_size
        return float(2 * weights + self._flops_of_adapters())

    @property
    def _weights_of_decoding(self) -> int:
        """Weights of all layers that compute a token of a decode pass; keys and values of an encoder's states are in
        the cache."""
        model = self.work.model
        return weights_of_layers(model) + model.num_layers * cross_weights(model)

    def _experts_read(self, rows: int) -> float:
        """Return how many experts of a layer a rank reads for the tokens that `rows` responses of each of the replicas
        that share them add. Tokens are assumed to choose evenly and independently."""
        model, ep = self.work.model, self.layout.ep
        if model.experts is None:
            return 0.0
        unused: float = (1 - model.experts.chosen / self.experts) ** (rows * ep)
        return self.experts / ep * (1 - unused)

    @property
    def _shared_experts(self) -> int:
        """Number of layers with a shared expert."""
        experts = self.work.model.experts
        return 0 if experts is None or experts.shared_ffn_size is None else expert_layers(self.work.model)

    @property
    def _sums_per_layer(self) -> float:
        """Products of a layer whose results a decode pass sums over tensor-parallel ranks, on average."""
        model = self.work.model
        return (2 if model.encoder is None else 3) + self._shared_experts / model.num_layers

    @property
    def _sending(self) -> str:
        return "all-reduces" if self.layout.ep == 1 else "all-reduces and exchanges of tokens"

    def _mostly(self) -> str:
        """Return what takes most of a forward pass of a microbatch."""
        work, layout, read = self.work, self.layout, self.work.read
        load = max(load.forward for load in self._loads(read, self._output(read))) / layout.tp / layout.cp
        whole = work.micro * sum(read) * work.model.hidden_size * work.element / layout.cp
        parts = {
            "products": work.micro * load / (self.cluster.gpu.flops * self.rates.products),
            "launching experts (host)": self._launching(self.expert_layers),
            "exchanges of tokens": self._exchange(whole, Phase("forward"), 2 * self.expert_layers),
            "gathering keys and values": self._gather(work.micro, sum(read), Phase("forward"), self._layers_of_stage()),
        }
        return max(parts, key=lambda name: parts[name])

    def _output(self, read: tuple[int, int]) -> int:
        """Return the number of a sequence's positions to which the output layer is applied, if every rank that shares
        it did as much as the rank with most of them."""
        return min(read[1], self.work.most_targets * self.layout.cp)

    def _layers_of_stage(self, frozen: int = 0) -> float:
        """Return the layers of a stage, without the share of the `frozen` ones."""
        return (self.work.model.layers - frozen) / self.layout.pp

    def _launching(self, layers: float) -> float:
        """Return the seconds in which the host launches a rank's experts of some layers, one after the other."""
        here = self.experts / self.layout.ep
        return layers * here * _LAUNCHES_OF_EXPERT * self.rates.host_s_per_layer

    def _microbatch(self, phase: Phase) -> tuple[float, float, float]:
        """Return the seconds of a microbatch's forward and backward pass and of its recomputation on one stage, and
        add the bytes it sends to the phase."""
        work = self.work
        forward = self._pass(work.micro, work.read, phase, backward=False)
        backward = self._pass(work.micro, work.read, phase, backward=True)
        if work.parallel.recompute != "full":
            return forward, backward, 0.0
        return forward, backward, self._pass(work.micro, work.read, phase, backward=False)

    def _pass(self, rows: int, read: tuple[int, int], phase: Phase, *, backward: bool) -> float:
        """Return the seconds of one microbatch on the slowest stage, and add the bytes it sends to the phase. `read` is
        as in `_loads`."""
        work, layout, cluster = self.work, self.layout, self.cluster
        loads = self._loads(read, self._output(read))
        flops = rows * max(load.backward if backward else load.forward for load in loads) / layout.tp / layout.cp
        frozen = work.model.layers - layers_with_gradients(work.model, work.adapter) if backward else 0
        routed = expert_layers(work.model, frozen) / layout.pp
        seconds = max(flops / (cluster.gpu.flops * self.rates.products), self._launching(routed))
        state = rows * work.model.hidden_size * work.element / layout.cp  # bytes of a position, a rank's share
        whole = state * sum(read)
        if layout.tp > 1:
            sent = state * (layout.tp - 1) / layout.tp * max(self._exchanged(load, backward) for load in loads)
            self._add(phase, self.tp_span, sent)
            # Half of the backward pass's communication overlaps the products for the weight gradients.
            seconds += sent / cluster.speed(self.tp_span) * (0.5 if backward else 1.0)
        seconds += self._exchange(whole, phase, 2 * routed)  # tokens to their experts, and results back
        # The backward pass gathers them again, and sums the gradients.
        seconds += self._gather(rows, sum(read), phase, (1 + backward) * self._layers_of_stage(frozen))
        if layout.pp > 1:
            split = layout.tp if layout.sequence_parallel else 1
            sent = whole / split * layout.vpp
            span = layout.tp * layout.copies * 2
            self._add(phase, span, sent)
            seconds += sent / cluster.speed(span)
        return seconds

    def _exchange(self, whole: float, phase: Phase, layers: float) -> float:
        """Return the seconds in which ranks send tokens to the ranks of their experts, or these the results back, in
        `layers` layers, and add the bytes to the phase.

        Every tensor-parallel rank sends all tokens, a copy for each chosen expert, and keeps those of its own experts.
        Within a machine they take the fast links at the same time as the others take the network.

        Args:
            whole: bytes of the states of all tokens that a rank computes.
            phase: the phase.
            layers: number of layers with experts.
        """
        experts, ep = self.work.model.experts, self.layout.ep
        if experts is None or ep == 1:
            return 0.0
        near = min(ep, max(1, self.cluster.per_node // self.layout.tp))  # ranks of a group in one machine
        sent = whole * experts.chosen * layers / ep
        within, between = sent * (near - 1), sent * (ep - near)
        phase.sent[_WITHIN] += within
        phase.sent[_BETWEEN] += between
        return max(within / self.cluster.speed(1), between / self.cluster.speed(self.cluster.per_node + 1))

    def _gather(self, rows: int, positions: int, phase: Phase, layers: float) -> float:
        """Return the seconds in which ranks that share sequences gather the keys and values of all positions in
        `layers` layers, or sum the gradients of these, and add the bytes to the phase. Nothing is computed meanwhile.
        """
        cp = self.layout.cp
        if cp == 1:
            return 0.0
        sent = rows * positions * self._cached_width * self.work.element * layers * (cp - 1) / cp
        self._add(phase, self.cp_span, sent)
        return sent / self.cluster.speed(self.cp_span)

    @property
    def _cached_width(self) -> float:
        """Elements of a position's key and value in a layer on a rank."""
        return 2 * max(1.0, self.work.model.kv_heads / self.layout.tp) * self.work.model.head_width

    def _exchanged(self, load: Load, backward: bool) -> float:
        """Return how many positions a tensor-parallel rank sends the states of: twice each that is summed, as its parts
        are scattered and gathered."""
        positions = 2 * load.summed
        if self.layout.sequence_parallel:  # what several ranks read is gathered, and its gradients are scattered
            return positions + load.shared + (load.gathered if backward else 0.0)
        return positions + (2 * load.shared if backward else 0.0)

    def _step(self, phase: Phase) -> tuple[float, float, float]:
        """Return the seconds to reduce gradients over all ranks that hold the same weights, gather updated weights, and
        update a rank's share."""
        held, gpu, layout = self.fullest, self.cluster.gpu, self.layout
        mine, moments = (held.distributed(name, layout) for name in ("trainable", "moments"))
        gradients, weights = (size * (held.trainable - mine) for size in (4, self.work.element))
        self._add(phase, self.dp_span, (gradients + weights) * self.work.steps * self._models())
        speed = self.cluster.speed(self.dp_span)
        moved = 14 * mine + 8 * moments  # bytes read and written: gradient, master weight, weight; moments
        return gradients / speed, weights / speed, moved / (gpu.bandwidth * gpu.reads)

    def _decode_bytes(self, rows: int) -> float:
        """Return the bytes that one stage reads per decode pass: weights, of experts those of any token, and the keys
        and values of prompts and half-finished responses."""
        work = self.work
        model, layout = work.model, self.layout
        seen = work.prompt + work.response / 2
        cache = self.layers * rows * self._cached_width * seen * work.element
        weights = self._weights_of_decoding * self.layers / model.num_layers / layout.tp
        if model.experts is not None:
            read = self._experts_read(rows) - model.experts.chosen
            weights += self.expert_layers * read * expert_weights(model) / layout.tp
        weights += padded_vocab(work.vocab_size, layout.tp) / layout.tp * model.hidden_size / layout.pp
        return float(cache + weights * work.element)

    def _small_all_reduce(self, rows: int, phase: Phase) -> float:
        tp = self.layout.tp
        if tp == 1:
            return 0.0
        sent = 2 * (tp - 1) / tp * rows * self.work.model.hidden_size * self.work.element
        self._add(phase, self.tp_span, self._sums_per_layer * self.layers * sent)
        slow = self.tp_span > self.cluster.per_node
        return self.cluster.gpu.latency_s * (4 if slow else 1) + sent / self.cluster.speed(self.tp_span)

    def _small_exchange(self, rows: int, phase: Phase) -> float:
        """Return the seconds of the exchanges with the ranks of experts in a decode pass: numbers of tokens, tokens and
        results in every layer."""
        if self.layout.ep == 1:
            return 0.0
        whole = rows * self.work.model.hidden_size * self.work.element
        slow = self.layout.tp * self.layout.ep > self.cluster.per_node
        latency = self.cluster.gpu.latency_s * (4 if slow else 1)
        return 3 * self.expert_layers * latency + self._exchange(whole, phase, 2 * self.expert_layers)

    def _add(self, phase: Phase, span: int, sent: float) -> None:
        phase.sent[_WITHIN if span <= self.cluster.per_node else _BETWEEN] += sent
