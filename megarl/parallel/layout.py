"""The grid of ranks as plain numbers; only this module computes how a world is split. No torch, no process groups."""

from dataclasses import dataclass

from megarl.config.offers import divisors
from megarl.config.sections.parallel import ParallelConfig
from megarl.errors import ConfigError


@dataclass(frozen=True)
class Layout:
    """Sizes of the tensor-, pipeline-, context- and data-parallel splits. One replica is tp x pp x cp ranks; `ep`
    replicas share the experts of a mixture."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1  # model chunks per pipeline rank; 1 is the plain schedule
    sequence_parallel: bool = False

    def __post_init__(self) -> None:
        for axis in ("tp", "pp", "dp", "cp", "ep", "vpp"):
            if getattr(self, axis) < 1:
                key, value = f"parallel.{axis}", getattr(self, axis)
                raise ConfigError(f"{key}={value} must be at least 1", key=key, value=value)
        if self.vpp > 1 and self.pp == 1:
            raise ConfigError(
                f"parallel.vpp={self.vpp} needs parallel.pp of 2 or more; set parallel.vpp=null",
                key="parallel.vpp",
                value=self.vpp,
                offers={"parallel.vpp": [None]},
            )
        if self.copies % self.ep:
            raise ConfigError(
                f"parallel.ep={self.ep} replicas cannot share experts: there are {self.copies}; start a multiple "
                f"of {self.tp * self.pp * self.ep} processes (trainer.devices x trainer.num_nodes)",
                key="parallel.ep",
                value=self.ep,
                offers={"parallel.ep": divisors(self.copies)},
            )
        if self.sequence_parallel and self.tp == 1:
            # With one tensor rank there is nothing to split a sequence over.
            object.__setattr__(self, "sequence_parallel", False)

    @classmethod
    def for_world(
        cls,
        world: int,
        *,
        tp: int = 1,
        pp: int = 1,
        cp: int = 1,
        ep: int = 1,
        vpp: int = 1,
        sequence_parallel: bool = False,
    ) -> "Layout":
        """Return the layout whose data-parallel size fills a world of `world` ranks."""
        replica = cls(tp=tp, pp=pp, cp=cp, vpp=vpp).replica_size  # also rejects sizes below one, naming their key
        if world % replica:
            raise ConfigError(
                f"parallel.tp={tp} x parallel.pp={pp} x parallel.cp={cp} = {replica} ranks do not divide the world "
                f"of {world}: start a multiple of {replica} processes (trainer.devices x trainer.num_nodes)",
                key="parallel.tp",
                value=tp,
            )
        return cls(tp=tp, pp=pp, dp=world // replica, cp=cp, ep=ep, vpp=vpp, sequence_parallel=sequence_parallel)

    @classmethod
    def of(cls, parallel: ParallelConfig, world: int) -> "Layout":
        """Return the layout of a world of `world` ranks with the settings `parallel.*`."""
        return cls.for_world(
            world,
            tp=parallel.tp,
            pp=parallel.pp,
            cp=parallel.cp,
            ep=parallel.ep,
            vpp=parallel.vpp or 1,
            sequence_parallel=parallel.sequence_parallel,
        )

    @property
    def copies(self) -> int:
        """Number of ranks that hold the same weights: those of all replicas, and those that share sequences."""
        return self.dp * self.cp

    @property
    def replica_size(self) -> int:
        """Number of ranks that together store one whole model."""
        return self.tp * self.pp * self.cp

    @property
    def world_size(self) -> int:
        """Number of ranks of all replicas."""
        return self.replica_size * self.dp

    def __str__(self) -> str:
        name = "x".join(
            f"{axis.upper()}{getattr(self, axis)}" for axis in ("tp", "pp", "cp", "ep", "dp") if getattr(self, axis) > 1
        )
        extras = [f"vpp{self.vpp}"] if self.vpp > 1 else []
        extras += ["SP"] if self.sequence_parallel else []
        return "+".join([name or "TP1", *extras])
