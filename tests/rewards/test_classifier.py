"""Published classifiers as reward functions: what they read, and that padding changes nothing."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.errors import DataError
from megarl.models.exchange.formats import open_source
from megarl.rewards import classifier
from megarl.rewards.reader import RewardReader
from megarl.tokenizers import ByteTokenizer
from tests.models.exchange.published import PUBLISHED, edit_config, stirred
from tests.refusals import refused

PROMPTS = ["a", "bc", "what is it? ", "d"]
OUTPUTS = ["yes", "no no no", "x", "a much longer answer than all others"]
BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model on bytes, whose padding is its EOS, as GPT-2's is."""
    folder = tmp_path_factory.mktemp("causal")
    config, arguments = PUBLISHED["llama3"]
    ids = {"bos_token_id": BYTES.eos_id, "eos_token_id": BYTES.eos_id, "pad_token_id": None}
    arguments = {**arguments, **ids, "vocab_size": BYTES.size, "num_labels": 1}
    settings = getattr(transformers, config)(**arguments)
    stirred(transformers.AutoModelForSequenceClassification.from_config(settings)).save_pretrained(folder)
    BYTES.save(folder)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with two labels."""
    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "yes", "no", "a", "bc", "x", "d", "what", "is", "it", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
    )
    stirred(transformers.BertForSequenceClassification(config)).save_pretrained(folder)
    return folder


def scores(folder: Path, **options: Any) -> list[float]:
    return classifier.score(prompts=PROMPTS, outputs=OUTPUTS, path=str(folder), samples=[], **options)


def test_a_causal_model_reads_each_response_to_its_eos_whatever_it_is_batched_with(causal: Path) -> None:
    reader = RewardReader(open_source(causal), BYTES)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(causal).eval()
    wanted = []
    for prompt, output in zip(PROMPTS, OUTPUTS, strict=True):
        tokens = reader.of_text(prompt, output, "here")
        assert tokens == [*BYTES.encode(prompt + output), BYTES.eos_id]
        with torch.no_grad():
            wanted.append(float(model(input_ids=torch.tensor([tokens])).logits))
    for batch_size in (1, 3, 16):
        assert scores(causal, batch_size=batch_size) == pytest.approx(wanted, abs=1e-5)


def test_scores_are_normalised_as_in_process(causal: Path, tmp_path: Path) -> None:
    folder = tmp_path / "normalised"
    folder.mkdir()
    for file in causal.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    edit_config(folder, score_mean=0.5, score_std=2.0)
    assert scores(folder) == pytest.approx([(one - 0.5) / 2 for one in scores(causal)], abs=1e-6)


def test_an_encoder_gives_the_probability_or_the_logit_of_a_label(encoder: Path) -> None:
    good, bad = scores(encoder, label="POSITIVE"), scores(encoder, label=0)
    assert [a + b for a, b in zip(good, bad, strict=True)] == pytest.approx([1.0] * 4)
    assert len(set(good)) > 1
    logits = [scores(encoder, label=label, gives="logit") for label in (0, 1)]
    assert torch.tensor(logits).softmax(dim=0)[1].tolist() == pytest.approx(good, abs=1e-5)
    assert scores(encoder, label=1, batch_size=1) == pytest.approx(good, abs=1e-5)
    assert scores(encoder, label=1, reads="pair") != pytest.approx(good)


def test_a_label_that_is_not_there_is_named_with_those_that_are(encoder: Path) -> None:
    for label in (None, "GOOD", 2):
        with pytest.raises(ValueError, match="NEGATIVE, POSITIVE"):
            scores(encoder, label=label)
    with pytest.raises(ValueError, match="reads='text'"):
        scores(encoder, label=0, reads="text")


def by_transformers(folder: Path, *texts: list[str]) -> torch.Tensor:
    """The logits [samples, labels] that transformers gives, one sample at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        return torch.cat([model(**tokenizer(*one, return_tensors="pt")).logits for one in zip(*texts, strict=True)])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_encoder_is_given_the_segments_of_a_pair(encoder: Path, batch_size: int) -> None:
    wanted = by_transformers(encoder, PROMPTS, OUTPUTS)[:, 1].tolist()
    found = scores(encoder, label=1, gives="logit", reads="pair", batch_size=batch_size)
    assert found == pytest.approx(wanted, abs=1e-5)


def copied(folder: Path, target: Path, **config: Any) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    edit_config(target, **config)
    return target


def test_padding_is_that_of_the_tokenizer(encoder: Path, tmp_path: Path) -> None:
    """On its side, with its token and with its segment."""
    left = copied(encoder, tmp_path / "left")
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder, padding_side="left")
    tokenizer.save_pretrained(left)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(encoder).eval()
    with torch.no_grad():
        wanted = model(**tokenizer(OUTPUTS, return_tensors="pt", padding=True)).logits[:, 0].tolist()
    assert scores(left, label=0, gives="logit") == pytest.approx(wanted, abs=1e-5)
    assert scores(encoder, label=0, gives="logit") != pytest.approx(wanted, abs=1e-5), "positions are absolute"


def test_a_tokenizer_without_padding_scores_texts_one_by_one(encoder: Path, tmp_path: Path) -> None:
    folder = copied(encoder, tmp_path / "unpadded", pad_token_id=None)
    found = scores(folder, label=1, gives="logit", batch_size=4)
    assert found == pytest.approx(by_transformers(folder, OUTPUTS)[:, 1].tolist(), abs=1e-5)


def test_a_model_that_knows_no_segments_is_given_none(encoder: Path, tmp_path: Path) -> None:
    config = transformers.RobertaConfig(
        vocab_size=15,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=40,
        type_vocab_size=1,
        pad_token_id=0,
        num_labels=2,
    )
    folder = copied(encoder, tmp_path / "roberta")
    stirred(transformers.RobertaForSequenceClassification(config)).save_pretrained(folder)
    found = scores(folder, label=1, gives="logit", reads="pair", batch_size=4)
    assert found == pytest.approx(scores(folder, label=1, gives="logit", reads="pair", batch_size=1), abs=1e-5)


def test_labels_that_do_not_exclude_each_other_have_each_their_own_probability(encoder: Path, tmp_path: Path) -> None:
    folder = copied(encoder, tmp_path / "several", problem_type="multi_label_classification")
    wanted = by_transformers(folder, OUTPUTS).sigmoid()
    for label in (0, 1):
        assert scores(folder, label=label) == pytest.approx(wanted[:, label].tolist(), abs=1e-5)
    assert scores(folder, label=1, gives="logit") == scores(encoder, label=1, gives="logit")


def test_a_text_that_is_too_long_names_the_option_and_the_sample(causal: Path) -> None:
    with refused(DataError, key="reward.options.path", where="sample 1"):
        classifier.score(prompts=["a", "b"], outputs=["c", "d" * 500], path=str(causal), samples=[])
