"""The PPO example of TRL's README (0.11 and before), with two changed imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megarl.compat.trl import AutoModelForCausalLMWithValueHead, PPOConfig, PPOTrainer, create_reference_model
from megarl.compat.trl.core import respond_to_batch
from megarl.errors import ConfigError, DataError, MegarlError
from tests.e2e.runs import launched
from tests.refusals import refused
from tests.worlds import Worlds

TEXT = "This morning I went to the "


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small GPT-2 with random weights and a tokenizer of bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    folder = tmp_path_factory.mktemp("gpt2")
    letters = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(vocab={**letters, "<|endoftext|>": len(letters)}, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=own, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=2, n_head=4, eos_token_id=tokenizer.eos_token_id
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def example(folder: Path, exported: Path) -> dict[str, Any]:
    model = AutoModelForCausalLMWithValueHead.from_pretrained(folder)
    model_ref = create_reference_model(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ppo_config = PPOConfig(batch_size=1, mini_batch_size=1)
    query_tensor = tokenizer.encode(TEXT, return_tensors="pt")
    response_tensor = respond_to_batch(model, query_tensor)
    ppo_trainer = PPOTrainer(ppo_config, model, model_ref, tokenizer)
    reward = [torch.tensor(1.0)]
    train_stats = ppo_trainer.step([query_tensor[0]], [response_tensor[0]], reward)
    ppo_trainer.save_pretrained(exported)
    ppo_trainer.close()
    return train_stats


def in_a_world(work: Any, *arguments: Any) -> Any:
    with launched():
        return work(*arguments)


def test_the_readme_example_trains(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    (stats,) = worlds.run(1, in_a_world, example, gpt2, tmp_path / "out")
    assert stats["ppo/mean_scores"] == 1.0
    assert stats["objective/kl"] == 0.0, "the reference is the policy before its first step"
    assert stats["ppo/learning_rate"] == pytest.approx(1.41e-5)
    before = transformers.AutoModelForCausalLM.from_pretrained(gpt2).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 1e-6 < moved < 4 * 1.5e-5 + 1e-6, "four steps of Adam at this learning rate"


@pytest.fixture(scope="module")
def trainer(gpt2: Path) -> Iterator[PPOTrainer]:
    """A trainer over two processes that it started, on sentences that end in a word."""
    config = PPOConfig(
        batch_size=4, mini_batch_size=2, learning_rate=1e-3, processes=2, overrides=("parallel.tp=2",), ppo_epochs=2
    )
    words = [{"query": word} for word in ("good", "bad", "nice", "dull", "fine", "poor", "warm", "cold")]
    model = AutoModelForCausalLMWithValueHead.from_pretrained(gpt2)
    made = PPOTrainer(config, model, None, None, words, data_collator=list)
    yield made
    made.close()


def test_a_loop_over_the_dataloader_trains(trainer: PPOTrainer) -> None:
    found = []
    for batch in trainer.dataloader:
        queries = [torch.tensor(list(one["query"].encode())) for one in batch]
        responses = trainer.generate(queries, lambda: 5, return_prompt=False, do_sample=True, top_k=0.0, top_p=1.0)
        assert all(1 <= len(one) <= 5 for one in responses)
        whole = trainer.generate(queries[0], max_new_tokens=3)
        assert whole[0, : len(queries[0])].tolist() == queries[0].tolist()
        found.append(trainer.step(queries, responses, [float(len(one)) for one in responses]))
    assert len(found) == 2
    assert found[0]["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert found[1]["objective/kl"] != 0.0, "the policy has moved from its reference"


@pytest.mark.parametrize(
    ("wrong", "kind", "key"),
    [
        (lambda trainer: trainer.step([torch.tensor([1])], [torch.tensor([2])], [1.0]), DataError, "queries"),
        (lambda trainer: trainer.generate(torch.tensor([1]), num_beams=4), ConfigError, "num_beams"),
        (lambda trainer: trainer.generate(torch.tensor([1]), min_length=5), ConfigError, "min_length"),
        (lambda trainer: PPOTrainer(trainer.config, trainer.model, "gpt2"), ConfigError, "ref_model"),
        (lambda trainer: PPOTrainer(trainer.config, trainer.model, optimizer=1), ConfigError, "optimizer"),
        (lambda trainer: PPOConfig(batch_size=3, mini_batch_size=2), ConfigError, "batch_size"),
        (lambda trainer: PPOConfig(kl_penalty="full"), ConfigError, "kl_penalty"),
        (lambda trainer: PPOConfig(log_with="wandb"), ConfigError, "log_with"),
        (
            lambda trainer: AutoModelForCausalLMWithValueHead.from_pretrained("gpt2", device_map="auto"),
            ConfigError,
            "device_map",
        ),
    ],
)
def test_what_is_not_there_is_refused_by_its_name(
    trainer: PPOTrainer, wrong: Any, kind: type[MegarlError], key: str
) -> None:
    with refused(kind, key=key):
        wrong(trainer)
