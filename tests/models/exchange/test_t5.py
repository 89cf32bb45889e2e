"""T5s in and out: transformers' log-probs in every layout, packed or not, greedy tokens, and the same bits back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from megarl.config.sections.parallel import ParallelConfig
from megarl.experience.rows import forward_rows
from megarl.models.attention import buckets
from megarl.models.build import build_engine
from megarl.models.exchange.export import export
from megarl.models.exchange.families import FAMILIES
from megarl.models.exchange.family import shape_of
from megarl.models.exchange.formats import open_source
from megarl.models.roles import Role
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import Microbatch
from megarl.rollout.generator import Generator, Limits
from megarl.rollout.requests import Request, Sampling
from tests.gated import gated
from tests.models.exchange.published import stored
from tests.models.exchange.t5 import EOS, KINDS, VOCAB, make, pairs, rows_of, save, their_logprobs
from tests.worlds import Worlds

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP1": (1, {}),
    "TP2+SP": (2, {"tp": 2, "sequence_parallel": True}),
    "PP2": (2, {"pp": 2}),
    "TP2xPP2": (4, {"tp": 2, "pp": 2}),
}


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize(("count", "longest"), [(32, 128), (16, 20), (8, 6)])
def test_distances_fall_into_the_published_buckets(count: int, longest: int, both_sides: bool) -> None:
    distance = torch.arange(-300, 301)
    theirs = T5Attention._relative_position_bucket(distance, both_sides, count, longest)
    assert torch.equal(buckets(distance, count, longest, both_sides=both_sides), theirs)


@pytest.mark.parametrize("name", ["t5", "mt5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_configuration_goes_out_and_comes_back(name: str, kind: str) -> None:
    family = FAMILIES[name]
    model = family.model_config(make(kind).config.to_dict())
    for positions in (model.max_positions, 64):
        model.max_positions = positions
        assert shape_of(family.model_config(family.hf_config(model, VOCAB))) == shape_of(model)


@pytest.mark.parametrize(
    ("ids", "start"),
    [
        ({"decoder_start_token_id": 0, "pad_token_id": 7}, 0),
        ({"decoder_start_token_id": 3, "pad_token_id": 0}, 3),
        ({"decoder_start_token_id": None, "pad_token_id": 7}, 7),
        ({"decoder_start_token_id": None, "pad_token_id": None}, 0),
    ],
)
def test_the_start_token_is_its_own_or_padding(ids: dict[str, Any], start: int) -> None:
    model = FAMILIES["t5"].model_config(make("T5 1.0").config.to_dict() | ids)
    assert model.encoder is not None
    assert model.encoder.start_id == start


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, T5ForConditionalGeneration]]:
    """Folder and model of every kind."""
    root = tmp_path_factory.mktemp("t5")
    return {kind: (root / kind, save(kind, root / kind)) for kind in KINDS}


def new_tokens(layout: dict[str, Any]) -> int:
    """Tokens of a greedy response: in one process they are compared with transformers' to the end of the context."""
    return 24 if layout else 64


def computed(folders: dict[str, Path], layout: dict[str, Any], out: Path) -> dict[str, Any]:
    """Log-probs of every kind, packed and not, greedy tokens; exports everything."""
    import torch.distributed as dist

    device = start_world()
    found: dict[str, Any] = {}
    for kind, folder in folders.items():
        grid = Grid(Layout.for_world(dist.get_world_size(), **layout), device)
        source = open_source(folder)
        role = Role("policy", source.model, VOCAB, source=source)
        engine = build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1)

        def logprobs(model: Any, hidden: Tensor, batch: Microbatch) -> dict[str, Tensor]:
            return {"logprobs": model.logprobs(hidden, batch.targets, batch.target_mask).logprobs}

        rows = rows_of(pairs())
        found[kind] = {
            packed: forward_rows(engine, rows, logprobs, per_microbatch=2, share_bins=packed)["logprobs"]
            for packed in (False, True)
        }
        generator = Generator(engine, EOS, seed=1, limits=Limits(slots=3))
        sampling = Sampling(temperature=0.0, max_new_tokens=new_tokens(layout))
        requests = [Request(i, s, tuple(prompt), sampling) for i, (prompt, _) in enumerate(pairs()) for s in range(2)]
        found[kind]["greedy"] = [(one.prompt_id, one.response, one.logprobs) for one in generator.generate(requests)]
        generator.close()
        export(engine, out / kind, model=source.model, vocab_size=VOCAB, family="t5")
        grid.close()
    return found


@pytest.mark.parametrize("layout", gated(LAYOUTS, ["PP2"]))
def test_every_kind_computes_and_generates_what_transformers_does_and_goes_back_bit_for_bit(
    layout: str, worlds: Worlds, published: dict[str, tuple[Path, T5ForConditionalGeneration]], tmp_path: Path
) -> None:
    size, grid = LAYOUTS[layout]
    ranks = worlds.run(size, computed, {kind: folder for kind, (folder, _) in published.items()}, grid, tmp_path)
    for kind, (folder, model) in published.items():
        rows = rows_of(pairs())
        for row, (prompt, response) in enumerate(pairs()):
            wanted = their_logprobs(model, prompt, response)
            settings = {"max_new_tokens": new_tokens(grid), "do_sample": False}
            with torch.no_grad():
                greedy = model.generate(torch.tensor([prompt]), **settings)[0].tolist()[1:]
            for rank in ranks:
                for packed in (False, True):
                    ours = rank[kind][packed][row][rows.action_mask[row] != 0]
                    assert float((ours - wanted).abs().max()) < 1e-4, (kind, row, packed)
                for number, tokens, _ in rank[kind]["greedy"]:
                    assert number != row or tokens == greedy, (kind, row)
        before, after = stored(folder), stored(tmp_path / kind)
        assert before.keys() == after.keys(), kind
        assert [key for key in before if not torch.equal(before[key], after[key])] == [], kind
