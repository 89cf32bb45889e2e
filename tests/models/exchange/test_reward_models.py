"""Published reward models of every family, in and out: the scores of transformers, and the same bits back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.sections.tokenizer import TokenizerConfig
from megarl.errors import CheckpointError
from megarl.experience.rows import at_last, score_rows
from megarl.models.build import build_engine
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.checkpoints import write_checkpoint
from megarl.models.exchange.export import export, write_folder
from megarl.models.exchange.formats import open_source
from megarl.models.exchange.nemo_write import write_nemo
from megarl.models.roles import Role
from megarl.parallel.grid import Grid, start_world
from megarl.parallel.layout import Layout
from megarl.parallel.rows import Rows
from megarl.tokenizers import ByteTokenizer
from tests.models.exchange.published import PUBLISHED, VOCAB, fixed_tokens, stirred, stored
from tests.refusals import refused
from tests.worlds import Worlds

PAD = 1
Published = dict[str, tuple[Path, Tensor]]


def ragged() -> Rows:
    """The fixed tokens, cut to several lengths, without the padding token among them."""
    tokens = fixed_tokens()
    tokens = torch.where(tokens == PAD, PAD + 1, tokens)
    lengths = torch.arange(len(tokens)) % 5 + tokens.shape[1] - 5
    kept = torch.arange(tokens.shape[1]) < lengths[:, None]
    return Rows(torch.where(kept, tokens, 0), lengths, kept.float())


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    """Folder and transformers' scores of a reward model of every family."""
    root, rows = tmp_path_factory.mktemp("reward"), ragged()
    kept = torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
    made: Published = {}
    for name, (config, arguments) in PUBLISHED.items():
        settings = getattr(transformers, config)(**{**arguments, "num_labels": 1, "pad_token_id": PAD})
        model = stirred(transformers.AutoModelForSequenceClassification.from_config(settings))
        model.save_pretrained(root / name)
        with torch.no_grad():
            tokens = torch.where(kept, rows.tokens, PAD)
            made[name] = root / name, model(input_ids=tokens, attention_mask=kept.long()).logits.squeeze(1)
    return made


def score_and_export(folders: dict[str, Path], tp: int, pp: int, out: Path) -> dict[str, Tensor]:
    """Scores of the ragged rows by name; exports everything."""
    device, found = start_world(), {}
    for name, folder in folders.items():
        grid, source = Grid(Layout(tp=tp, pp=pp), device), open_source(folder)
        role = Role("reward", source.model, VOCAB, ("score",), source=source)
        engine = build_engine(role, grid, ParallelConfig(), precision="fp32", seed=1)
        found[name] = at_last(score_rows(engine, ragged(), per_microbatch=2, share_bins=True), ragged())
        family = source.family and source.family.name
        described: dict[str, Any] = {"score_moments": (0.5, 2.0), "reward_kind": "steps"}
        export(engine, out / name, model=source.model, vocab_size=VOCAB, family=family, **described)
        grid.close()
    return found


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_every_family_scores_as_transformers_does_and_goes_back_bit_for_bit(
    tp: int, pp: int, worlds: Worlds, published: Published, tmp_path: Path
) -> None:
    ranks = worlds.run(
        tp * pp, score_and_export, {name: folder for name, (folder, _) in published.items()}, tp, pp, tmp_path
    )
    for name, (folder, scores) in published.items():
        assert float(scores.std()) > 0.02, f"{name} is too flat to prove anything"
        for rank in ranks:
            torch.testing.assert_close(rank[name], scores, rtol=1e-4, atol=1e-4)
        before, after = stored(folder), stored(tmp_path / name)
        assert before.keys() == after.keys(), name
        assert [key for key in before if not torch.equal(before[key], after[key])] == [], name
        written = open_source(tmp_path / name)
        assert (written.score_moments, written.reward_kind) == ((0.5, 2.0), "steps")
        assert open_source(folder).reward_kind is None


def test_transformers_loads_what_is_written(published: Published, worlds: Worlds, tmp_path: Path) -> None:
    worlds.run(1, score_and_export, {name: folder for name, (folder, _) in published.items()}, 1, 1, tmp_path)
    for name, (_, scores) in published.items():
        write_checkpoint(open_source(tmp_path / name), tmp_path / f"{name}-checkpoint")
        write_folder(open_source(tmp_path / f"{name}-checkpoint"), tmp_path / f"{name}-again")
        for folder in (tmp_path / name, tmp_path / f"{name}-again"):
            theirs, info = transformers.AutoModelForSequenceClassification.from_pretrained(
                folder, output_loading_info=True, pad_token_id=PAD
            )
            assert not info["missing_keys"]
            assert not info["unexpected_keys"]
            rows = ragged()
            kept = torch.arange(rows.tokens.shape[1]) < rows.lengths[:, None]
            with torch.no_grad():
                tokens = torch.where(kept, rows.tokens, PAD)
                again = theirs(input_ids=tokens, attention_mask=kept.long()).logits.squeeze(1)
            assert torch.equal(again, scores), folder
            assert open_source(folder).reward_kind == "steps", "it goes through a checkpoint too"


def copied(folder: Path, made: Path, **keys: Any) -> Path:
    """A copy of a folder with other keys in its config.json."""
    made.mkdir()
    for file in folder.iterdir():
        (made / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text()) | keys
    (made / "config.json").write_text(json.dumps(config))
    return made


def logit(folder: Path, tokens: list[int]) -> float:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        return float(model(input_ids=torch.tensor([tokens])).logits)


@pytest.mark.parametrize("pad", [2, 1, None], ids=["EOS is the padding", "another token is", "there is none"])
def test_where_a_score_is_read_survives_every_conversion(pad: int | None, published: Published, tmp_path: Path) -> None:
    """Of a published model, transformers reads the score before the EOS if that is the padding."""
    folder = copied(published["llama"][0], tmp_path / "first", pad_token_id=pad, eos_token_id=2)
    reads_eos = pad != 2
    assert open_source(folder).score_reads_eos == reads_eos
    write_checkpoint(open_source(folder), tmp_path / "checkpoint")
    write_folder(open_source(tmp_path / "checkpoint"), tmp_path / "second")
    write_folder(open_source(tmp_path / "second"), tmp_path / "third")
    for name in ("checkpoint", "second", "third"):
        assert open_source(tmp_path / name).score_reads_eos == reads_eos, name
    text = [5, 6, 7]
    wanted = logit(folder, [*text, 2])
    assert (wanted == pytest.approx(logit(folder, text), abs=1e-4)) == (not reads_eos)
    for name in ("second", "third"):
        assert logit(tmp_path / name, [*text, 2]) == pytest.approx(wanted, abs=1e-5), name


def test_what_is_known_of_the_eos_is_preferred_to_a_guess(published: Published, tmp_path: Path) -> None:
    folder = published["llama"][0]
    for name, ids, reads_eos in (("list", {"pad_token_id": 3, "eos_token_id": [2, 3]}, False), ("no ids", {}, True)):
        assert open_source(copied(folder, tmp_path / name, **ids)).score_reads_eos == reads_eos, name
    for said in (True, False):
        made = copied(folder, tmp_path / str(said), pad_token_id=2, eos_token_id=2, score_reads_eos=said)
        assert open_source(made).score_reads_eos == said
    with refused(CheckpointError, key="score_reads_eos", value=1):
        open_source(copied(folder, tmp_path / "wrong", score_reads_eos=1))


def test_a_trained_model_reads_the_eos() -> None:
    tokenizer = ByteTokenizer()
    card = ModelCard.of(ModelConfig(), tokenizer.size, tokenizer, TokenizerConfig())
    assert card.plain()["score_reads_eos"] is True


def test_what_is_no_reward_model_is_refused(published: Published, tmp_path: Path) -> None:
    folder = published["llama"][0]

    def changed(name: str, **keys: Any) -> Path:
        return copied(folder, tmp_path / name, **keys)

    with refused(CheckpointError, key="id2label"):
        open_source(changed("two", id2label={"0": "bad", "1": "good"}))
    with refused(CheckpointError, key="score_mean", value=1):
        open_source(changed("moments", score_mean=1, score_std=0))
    with refused(CheckpointError, key="score.weight"):
        open_source(changed("no head", architectures=["LlamaForCausalLM"]))
    with refused(CheckpointError):
        write_nemo(open_source(folder), tmp_path / "a.nemo")


def build_policy(folder: Path) -> None:
    grid, source = Grid(Layout(), start_world()), open_source(folder)
    build_engine(Role("policy", source.model, VOCAB, source=source), grid, ParallelConfig(), precision="fp32", seed=1)


def test_a_reward_model_that_is_given_as_a_policy_is_refused_by_its_key(published: Published, worlds: Worlds) -> None:
    folder = published["llama"][0]
    with refused(CheckpointError, key="model.path", value=str(folder), where=str(folder)):
        worlds.run(1, build_policy, folder)
