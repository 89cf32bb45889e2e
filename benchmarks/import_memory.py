"""Peak memory of importing a published model into tensor-parallel ranks, beside what each rank keeps of it.

`python -m benchmarks.import_memory [gigabytes] [tp]` writes a random Llama of about that size (1 GB unless told), reads
it into `tp` processes (2) and prints, per rank, how far its resident memory rose above what it was before the model was
built. The promise is the rank's own shard and one tensor: the table shows what is left over and the largest tensors.
"""

import json
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.spawn import spawn

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.stored import Stored, write_safetensors

MB = 1e6
VOCAB, HIDDEN, FFN = 32000, 1024, 4096


def write_model(folder: Path, gigabytes: float) -> None:
    """A random float32 Llama in one safetensors file."""
    layer = 4 * (4 * HIDDEN * HIDDEN + 3 * HIDDEN * FFN)
    layers = max(2, round((gigabytes * 1e9 - 2 * 4 * VOCAB * HIDDEN) / layer))
    model = ModelConfig(
        num_layers=layers, hidden_size=HIDDEN, num_heads=16, ffn_size=FFN, max_positions=2048, vocab_size=VOCAB
    )
    family = FAMILIES["llama"]
    mapping = family.mapping(model, VOCAB)
    described = [
        (name, Stored(shape, torch.float32))
        for mapped in mapping.values()
        for name, shape in mapped.their_shapes().items()
    ]

    def random() -> Iterator[torch.Tensor]:
        for _, stored in described:
            yield torch.randn(stored.shape)

    write_safetensors(folder / "model.safetensors", described, random(), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(family.hf_config(model, VOCAB)))


def resident(field: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure(rank: int, tp: int, port: int, folder: str, out: str) -> None:
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(tp), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    from megarl.models.build import build_engine
    from megarl.models.exchange.formats import open_source
    from megarl.models.roles import Role
    from megarl.parallel.grid import Grid, start_world
    from megarl.parallel.layout import Layout

    torch.set_num_threads(1)
    grid = Grid(Layout(tp=tp), start_world())
    source = open_source(folder)
    # Libraries take their memory at first use: that is not the import's.
    build_engine(
        Role("warm", ModelConfig(num_layers=1, hidden_size=64, num_heads=4), 64),
        grid,
        ParallelConfig(),
        precision="fp32",
        seed=1,
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    engine = build_engine(
        Role("policy", source.model, VOCAB, source=source), grid, ParallelConfig(), precision="fp32", seed=1
    )
    shard = sum(parameter.numel() * parameter.element_size() for _, parameter in engine.parameters())
    largest = max(tp * parameter.numel() * parameter.element_size() for _, parameter in engine.parameters())
    found: list[Any] = grid.gather([shard, largest, resident("VmHWM") - before, resident("VmRSS") - before])
    if rank == 0:
        Path(out).write_text(json.dumps(found))
    grid.close()


def main() -> None:
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    tp = int(sys.argv[2]) if len(sys.argv) > 2 else 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch) / "model", Path(scratch) / "found.json"
        folder.mkdir()
        write_model(folder, gigabytes)
        size = (folder / "model.safetensors").stat().st_size
        spawn(measure, (tp, port, str(folder), str(out)), nprocs=tp)
        found = json.loads(out.read_text())
    print(f"import of a {size / MB:.0f} MB Llama (float32) into TP{tp}, on the CPU\n")
    print("| rank | own shard, MB | largest tensor, MB | peak growth, MB | beyond the shard, MB | after, MB |")
    print("| --- | --- | --- | --- | --- | --- |")
    for rank, (shard, largest, peak, after) in enumerate(found):
        values = (shard, largest, peak, peak - shard, after)
        print(f"| {rank} | " + " | ".join(f"{value / MB:.0f}" for value in values) + " |")
    within = all(peak <= shard + largest for shard, largest, peak, _ in found)
    print(f"\nown shard and one tensor: {'kept' if within else 'EXCEEDED'}")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
