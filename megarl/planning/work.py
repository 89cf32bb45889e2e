"""A run on a layout as numbers: its models, batches, lengths, and how often each operation happens."""

from dataclasses import dataclass, replace
from typing import Any

from megarl.config.cluster import PlanConfig
from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.adapter_spec import AdapterSpec
from megarl.models.exchange.pretrained import Sources
from megarl.models.roles import Role
from megarl.modules.base import Module
from megarl.modules.workload import Workload
from megarl.parallel.context import slices_of
from megarl.parallel.layout import Layout
from megarl.rollout.resharded import other_layout


@dataclass(frozen=True, kw_only=True)
class Work(Workload):
    """A run on a layout. Counts of sequences are per unit of work, as in `Workload`.

    Attributes:
        roles: the models of the run, the policy first.
        model: the shape of the present model: the policy's, or after `of` another role's.
        vocab_size: vocabulary size of that model.
        adapter: the adapters of that model.
        micro: number of sequences in one forward pass.
        global_batch: number of sequences per optimizer step.
    """

    algorithm: str
    roles: tuple[Role, ...]
    model: ModelConfig
    parallel: ParallelConfig
    layout: Layout
    vocab_size: int
    precision: str
    micro: int
    global_batch: int
    adapter: AdapterSpec | None = None

    @property
    def accumulation(self) -> int:
        """Microbatches per optimizer step and replica."""
        return max(1, self.global_batch // (self.micro * self.layout.dp))

    @property
    def element(self) -> int:
        """Bytes of a weight or activation."""
        return 2 if self.precision == "bf16" else 4

    @property
    def read(self) -> tuple[int, int]:
        """Positions of a training sequence in an encoder (0 without one) and in the decoder, or the model's only
        layers."""
        encoder = self.encoded if self.model.encoder is not None else 0
        return encoder, self.length - encoder

    @property
    def computed(self) -> tuple[int, int]:
        """The positions of `read` that a rank computes: with `parallel.cp`, two slices of the decoder's."""
        encoder, decoder = self.read
        return encoder, decoder if self.layout.cp == 1 else 2 * self._slice

    @property
    def most_targets(self) -> int:
        """Positions of a training sequence to which a rank applies the output layer, on the rank that has most of them:
        targets are the last positions, and a rank has an early and a late slice (`TimeSlices`)."""
        ranks, length = self.layout.cp, self._slice
        if ranks == 1:
            return self.loss_tokens
        end = self.read[1]

        def targets(place: int) -> int:
            return max(0, min((place + 1) * length, end) - max(place * length, end - self.loss_tokens))

        return max(targets(rank) + targets(slices_of(ranks) - 1 - rank) for rank in range(ranks))

    @property
    def _slice(self) -> int:
        """Positions of a slice of a training sequence; plans of microbatches round up."""
        return -(-self.read[1] // slices_of(self.layout.cp))

    @property
    def engines(self) -> tuple[Role, ...]:
        """The roles that use memory on the device."""
        return tuple(role for role in self.roles if role.on_device)

    @property
    def masks(self) -> int:
        """Number of models that generate beside the policy and mask its tokens."""
        return sum(role.follows for role in self.roles)

    @property
    def rewards(self) -> tuple[Role, ...]:
        """The reward models."""
        return tuple(role for role in self.roles if role.scores)

    @property
    def generates(self) -> bool:
        """Whether the run generates responses, to train on or to evaluate."""
        return bool(self.rollouts) or self.evaluates

    @property
    def offloads(self) -> bool:
        """Whether idle models and optimizer state move to host memory."""
        return self.parallel.offload and self.generates

    def of(self, role: Role) -> "Work":
        """Return the same run with the model of another role."""
        return replace(self, model=role.model, vocab_size=role.vocab_size, adapter=role.adapter)

    @property
    def generating(self) -> "Work":
        """The same run as it generates: in its generation layout, or where ranks share sequences, with each of them as
        a replica."""
        other = other_layout(self.rollout_layout, self.layout)
        if other is not None:
            return self.on(other, micro=self.micro, recompute="none")
        if self.layout.cp == 1:
            return self
        alone = replace(self.layout, cp=1, dp=self.layout.copies)
        return self.on(alone, micro=self.micro, recompute=self.parallel.recompute)

    @property
    def moves_weights(self) -> bool:
        """Whether it generates in another layout, with a second copy of the policy's weights."""
        return other_layout(self.rollout_layout, self.layout) is not None

    def on(self, layout: Layout, *, micro: int, recompute: str) -> "Work":
        """Return the same run in another layout."""
        parallel = replace(
            self.parallel,
            tp=layout.tp,
            pp=layout.pp,
            cp=layout.cp,
            ep=layout.ep,
            vpp=layout.vpp if layout.vpp > 1 else None,
            sequence_parallel=layout.sequence_parallel,
            recompute=recompute,
        )
        return replace(self, layout=layout, micro=micro, parallel=parallel)


def work_of(
    module: type[Module], config: Any, plan: PlanConfig, gpus: int, vocab_size: int, sources: Sources | None = None
) -> Work:
    """Return the run of an algorithm's module that `config`, its entry point's tree, describes on `gpus` GPUs."""
    parallel = config.parallel
    layout = Layout.of(parallel, gpus)
    workload = module.plan(config, plan)
    roles = tuple(module.roles(config, vocab_size, Sources() if sources is None else sources))
    return Work(
        **vars(workload),
        algorithm=plan.algorithm,
        roles=roles,
        model=config.model,
        parallel=parallel,
        layout=layout,
        vocab_size=vocab_size,
        precision=config.trainer.precision,
        micro=config.trainer.micro_batch_size * workload.per_unit,
        global_batch=config.trainer.global_batch_size * workload.per_unit,
        adapter=roles[0].adapter,
    )
