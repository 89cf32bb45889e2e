"""Context parallelism: ranks that share sequences train alike with one process, whatever masks, heads and other splits
there are, and keep only their part of the activations."""

from typing import Any

import torch

from megarl.config.sections.model import ExpertsConfig
from megarl.models.experts import RouterStats
from megarl.models.gpt import GPT
from megarl.modules.losses import count_targets, cross_entropy
from megarl.parallel.engine import Engine
from megarl.parallel.microbatches import make_microbatches
from megarl.parallel.passes import Outputs
from megarl.parallel.rows import Microbatch, Rows
from tests.parallel.engines import VOCAB, small_engine
from tests.worlds import Worlds

STEPS = 3
MODELS: dict[str, dict[str, Any]] = {
    "plain": {"hidden_size": 32, "num_heads": 4, "max_positions": 512},
    "grouped heads, rotary, window": {
        "hidden_size": 32,
        "num_heads": 4,
        "num_kv_heads": 2,
        "position": "rope",
        "sliding_window": 40,
        "max_positions": 512,
    },
    "experts": {
        "hidden_size": 32,
        "max_positions": 512,
        "experts": ExpertsConfig(count=4, chosen=2, ffn_size=24, balance=0.1, z_loss=0.01),
    },
}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "CP2": (2, {"cp": 2}),
    "CP4": (4, {"cp": 4}),
    "CP2xTP2": (4, {"cp": 2, "tp": 2}),
    "CP2xTP2+SP": (4, {"cp": 2, "tp": 2, "sequence_parallel": True}),
    "CP2xPP2": (4, {"cp": 2, "pp": 2}),
    "CP2xPP2 with virtual stages": (4, {"cp": 2, "pp": 2, "vpp": 2}),
    "CP2xDP2": (4, {"cp": 2}),
    "CP2xEP2": (2, {"cp": 2, "ep": 2}),
}


def ragged_rows(longest: int) -> Rows:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(longest // 3, longest, (7,), generator=generator)
    lengths[0] = 3
    inside = torch.arange(longest) < lengths[:, None]
    tokens = torch.randint(1, VOCAB, inside.shape, generator=generator) * inside
    return Rows(tokens, lengths, inside.float())


def logprobs(engine: Engine, batch: list[Microbatch]) -> torch.Tensor:
    def of_tokens(model: GPT, hidden: torch.Tensor, batch: Microbatch) -> Outputs:
        found = model.logprobs(hidden, batch.targets, batch.target_mask, entropy=True)
        assert found.entropy is not None
        return {"logprobs": found.logprobs, "entropy": found.entropy}

    found = engine.forward(batch, of_tokens)
    return torch.stack([torch.stack([each["logprobs"].sum(), each["entropy"].sum()]) for each in found]).sum(0)


def learned(
    layout: dict[str, Any], model: dict[str, Any], longest: int, *, share_bins: bool = False, **options: Any
) -> list[dict[str, float]]:
    engine = small_engine(layout, model, **options)
    if engine.config.experts is not None:
        engine.observer = RouterStats(engine.models, engine.config, engine.grid)
    rows, history = ragged_rows(longest), []
    for _ in range(STEPS):
        batch = make_microbatches(rows, torch.arange(len(rows)), engine, per_microbatch=2, share_bins=share_bins)
        stats = engine.train_step(batch, cross_entropy, count_targets)
        reached, wanted = engine.gradient_names()
        assert not wanted - reached
        history.append({**stats, **engine.observed, "norm": engine.apply_gradients()})
    batch = make_microbatches(rows, torch.arange(len(rows)), engine, per_microbatch=2, share_bins=share_bins)
    sums = engine.grid.sum_over_data(logprobs(engine, batch).double())
    history.append(dict(zip(("logprobs", "entropy"), sums.tolist(), strict=True)))
    return history


CASES = {
    "plain, short": ("plain", 30, {}),
    "plain, long": ("plain", 400, {}),
    "plain, long, packed": ("plain", 400, {"share_bins": True}),
    "plain, long, recompute all": ("plain", 400, {"recompute": "full"}),
    "plain, long, recompute attention": ("plain", 400, {"recompute": "selective"}),
    "grouped": ("grouped heads, rotary, window", 400, {}),
    "grouped, packed": ("grouped heads, rotary, window", 400, {"share_bins": True}),
    "experts": ("experts", 60, {"share_bins": True}),
}


def _run(case, layout, worlds):
    model, longest, options = CASES[case]
    size, where = LAYOUTS[layout]
    (want,) = worlds.run(1, learned, {}, MODELS[model], longest, **options)
    worst = 0
    for found in worlds.run(size, learned, where, MODELS[model], longest, **options):
        for a, b in zip(found, want, strict=True):
            for k in b:
                worst = max(worst, abs(a[k] - b[k]) / max(abs(b[k]), 1e-6))
    return worst


if __name__ == "__main__":
    worlds = Worlds()
    for case in CASES:
        for layout in LAYOUTS:
            if ("EP" in layout) and case != "experts":
                continue
            try:
                print(case, layout, _run(case, layout, worlds), flush=True)
            except Exception as e:
                print(case, layout, type(e), str(e)[-3000:], getattr(e, "__notes__", ""), flush=True)
                break
