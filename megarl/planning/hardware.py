"""Speeds of GPUs and their links: the vendor's peaks, and the fractions of them that good kernels reach."""

from dataclasses import dataclass

from megarl.config.cluster import ClusterConfig

GIB = 2**30


@dataclass(frozen=True)
class GPU:
    """One kind of device. Peaks are the vendor's, in bytes or operations per second; the other numbers are assumptions.

    `links` is NVLink in one direction, `network` is one GPU's share of the machine's network adapters.
    """

    name: str
    memory: int
    flops: float  # dense bfloat16
    bandwidth: float
    links: float
    network: float
    products: float  # fraction of peak that a large layer reaches, including the operations around its matrix products
    reads: float = 0.80  # fraction of memory bandwidth that a decode pass reaches
    sends: float = 0.75  # fraction of a link's bandwidth that a large collective reaches
    latency_s: float = 15e-6  # of a small all-reduce within a machine


KINDS = {
    "a100": GPU("A100-80G", 80 * GIB, 312e12, 2.04e12, 300e9, 25e9, products=0.66),
    "h100": GPU("H100-80G", 80 * GIB, 989e12, 3.35e12, 450e9, 50e9, products=0.58),
    "h200": GPU("H200-141G", int(141e9), 989e12, 4.80e12, 450e9, 50e9, products=0.60),
}


def kind_of(device: str) -> str | None:
    """Return the kind of GPU that torch's name of a device stands for; None for all others.

    PCIe and NVL cards have other peaks than those above, and a MIG slice has a part of them.
    """
    name = device.upper()
    if any(word in name for word in ("PCIE", "NVL", "MIG")):
        return None
    found = next((kind for kind in KINDS if kind.upper() in name), None)
    return None if found == "a100" and "80GB" not in name else found


@dataclass(frozen=True)
class Cluster:
    """GPUs in machines, and how much of their memory a run may use."""

    gpu: GPU
    gpus: int
    per_node: int
    usable: int  # bytes of a GPU that are available to tensors
    host: int  # host memory of a machine in bytes

    @classmethod
    def of(cls, config: ClusterConfig, gpus: int) -> "Cluster":
        """Build the cluster of `gpus` GPUs that the configuration describes; usable memory excludes the reserve."""
        gpu = KINDS[config.gpu]
        memory = gpu.memory if config.memory_gib is None else int(config.memory_gib * GIB)
        usable = int((memory - config.reserve_gib * GIB) * (1 - config.fragmentation))
        per_node = min(config.gpus_per_node, gpus)
        return cls(gpu, gpus, per_node, usable, int(config.host_memory_gib * GIB))

    def speed(self, span: int) -> float:
        """Return bytes per second and GPU of a collective over ranks within `span` neighbouring ones."""
        return self.gpu.sends * (self.gpu.links if span <= self.per_node else self.gpu.network)
