"""The features that the suite pairs, as settings of a configuration, and the cases made of them. Pure Python."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from math import prod
from typing import Any

CHANGES_NUMBERS = ("model.", "adapter.")
"""Beginnings of the keys that make another model. The others only spread the work or cut it."""
MODEL: Mapping[str, Any] = {
    "model.num_layers": 4,
    "model.hidden_size": 32,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_size": 48,
    "model.max_positions": 320,
    "model.qk_norm": True,
    "model.qkv_bias": True,
    "model.out_bias": True,
    "model.init_std": 0.1,
}
"""The model of every case: small, with a tensor of each kind that layouts treat differently."""
EXPERTS: Mapping[str, Any] = {
    "model.experts.count": 4,
    "model.experts.chosen": 2,
    "model.experts.ffn_size": 24,
    "model.experts.shared_ffn_size": 40,
    "model.experts.dense_layers": [1],
    "model.experts.balance": 0.1,
    "model.experts.z_loss": 0.01,
}


@dataclass(frozen=True)
class Feature:
    """Something that a run can switch on.

    Attributes:
        key: its short name.
        about: what it does, in a few words.
        settings: the configuration keys that switch it on. A tree that lacks one of them has no such choice.
        needs: the feature without which it has no effect.
        replicas: by how much it multiplies the number of replicas.
        starts_alike: whether the first loss, and the first gradients of what trains, are those without it.
    """

    key: str
    about: str
    settings: Mapping[str, Any] = field(default_factory=dict, hash=False)
    needs: str | None = None
    replicas: int = 1
    starts_alike: bool = False


FEATURES = (
    Feature("tp", "tensor parallelism", {"parallel.tp": 2}),
    Feature("sp", "sequence parallelism", {"parallel.sequence_parallel": True}, needs="tp"),
    Feature("pp", "pipeline parallelism", {"parallel.pp": 2}),
    Feature("vpp", "virtual pipeline stages", {"parallel.vpp": 2}, needs="pp"),
    Feature("dp", "data parallelism", replicas=2),
    Feature("cp", "context parallelism", {"parallel.cp": 2}),
    Feature("ep", "experts, shared by replicas", {"parallel.ep": 2, **EXPERTS}, replicas=2),
    Feature("recompute", "recomputed activations", {"parallel.recompute": "full"}),
    Feature("pack", "packing of short rows", {"data.pack": True, "ppo.pack": True}),
    Feature("cut", "another cut into microbatches", {"trainer.micro_batch_size": 4}),
    Feature("freeze", "frozen layers", {"model.num_layers_unfrozen": 2}, starts_alike=True),
    Feature("adapter", "adapters", {"adapter.kind": "dora", "adapter.rank": 4}, starts_alike=True),
    Feature("tied", "tied embeddings", {"model.tie_embeddings": True}),
)
BY_KEY = {feature.key: feature for feature in FEATURES}


@dataclass(frozen=True)
class Case:
    """Features that are switched on together, in the order of `FEATURES`; none of them: the plain model."""

    keys: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The features, as in tp+pp; plain without any."""
        return "+".join(self.keys) or "plain"

    @property
    def features(self) -> list[Feature]:
        """The features and those that they need."""
        wanted = {*self.keys, *(BY_KEY[key].needs for key in self.keys)}
        return [feature for feature in FEATURES if feature.key in wanted]

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration keys that differ from the defaults, the model's included."""
        merged = dict(MODEL)
        for feature in self.features:
            merged.update(feature.settings)
        return merged

    @property
    def replicas(self) -> int:
        """The number of replicas, of which a world may have a multiple."""
        return prod(feature.replicas for feature in self.features)

    @property
    def world(self) -> int:
        """The number of processes: one replica's times the number of replicas."""
        settings = self.settings
        of_replica = [int(settings.get(f"parallel.{axis}", 1)) for axis in ("tp", "pp", "cp")]
        return self.replicas * prod(of_replica)

    @property
    def reference(self) -> Reference:
        """The training in one process that the case must agree with."""
        kept = {key: value for key, value in self.settings.items() if key.startswith(CHANGES_NUMBERS)}
        changed = [feature.key for feature in self.features if any(_changes(key) for key in feature.settings)]
        return Reference("+".join(changed) or "plain", kept)

    @property
    def is_its_reference(self) -> bool:
        """Whether the model alone is changed, so that in one process the case is what others are compared with."""
        return self.settings == self.reference.settings and self.replicas == 1

    @property
    def started_from(self) -> Case:
        """The case without the features that change neither the first loss nor the first gradients."""
        return Case(tuple(key for key in self.keys if not BY_KEY[key].starts_alike))


@dataclass(frozen=True)
class Reference:
    """A model that is trained in one process, with the settings that make it."""

    name: str
    settings: Mapping[str, Any] = field(hash=False)


def _changes(key: str) -> bool:
    return key.startswith(CHANGES_NUMBERS)


def cases(only: Collection[str] = ()) -> Iterator[Case]:
    """Yield a case for each feature and for each pair of them.

    Args:
        only: the features that cases are made of; empty: all.
    """
    keys = [feature.key for feature in FEATURES if not only or feature.key in only]
    yield from (Case((key,)) for key in keys)
    yield from (Case(pair) for pair in combinations(keys, 2))
