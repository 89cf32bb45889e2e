"""The PPO example of TRL's README (0.11 and before), with two changed imports."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from megarl.compat.trl import (
    AutoModelForCausalLMWithValueHead,
    AutoModelForSeq2SeqLMWithValueHead,
    PPOConfig,
    PPOTrainer,
    create_reference_model,
)
from megarl.compat.trl.core import respond_to_batch
from megarl.errors import ConfigError, DataError, MegarlError
from megarl.inputs import default_config
from tests.refusals import assert_refusal, refused
from tests.seeds.conftest import script
from tests.worlds import Worlds

TEXT = "This morning I went to the "


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


def test_the_readme_example_trains(worlds: Worlds, gpt2: Path, tmp_path: Path) -> None:
    (stats,) = worlds.run(1, script, example, (gpt2, tmp_path / "out"))
    assert stats["ppo/mean_scores"] == 1.0
    assert stats["objective/kl"] == 0.0, "the reference is the policy before its first step"
    assert stats["ppo/learning_rate"] == pytest.approx(1.41e-5)
    before = transformers.AutoModelForCausalLM.from_pretrained(gpt2).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    moved = max(float((after[name] - before[name]).abs().max()) for name in before)
    assert 1e-6 < moved < 4 * 1.5e-5 + 1e-6, "four steps of Adam at this learning rate"


# How a session works over several processes of its own is what tests/test_session.py checks.
PROCESSES = [(1, ("parallel.tp=1",)), pytest.param((2, ("parallel.tp=2",)), marks=pytest.mark.gate)]


@pytest.fixture(scope="module", params=PROCESSES, ids=["one process", "two processes"])
def trainer(gpt2: Path, request: pytest.FixtureRequest) -> Iterator[PPOTrainer]:
    """A trainer over processes that it started, on sentences that end in a word."""
    processes, overrides = request.param
    config = PPOConfig(
        batch_size=4, mini_batch_size=2, learning_rate=1e-3, processes=processes, overrides=overrides, ppo_epochs=2
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


def of_a_t5(folder: Path, exported: Path) -> Any:
    """The same of an encoder-decoder: its encoder reads queries, and what it generates begins with the start token."""
    model = AutoModelForSeq2SeqLMWithValueHead.from_pretrained(
        folder, peft_config={"r": 2, "target_modules": ["q", "v"]}
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    config = PPOConfig(batch_size=2, mini_batch_size=2, ppo_epochs=1, learning_rate=1e-2)
    trainer = PPOTrainer(config, model, create_reference_model(model), tokenizer)
    queries = [tokenizer(text, return_tensors="pt").input_ids[0] for text in ("the cat sat", "a good film")]
    greedy = model.generate(torch.stack([queries[0]] * 2), max_new_tokens=5, do_sample=False)
    responses = trainer.generate(queries, max_new_tokens=6, return_prompt=False, do_sample=True)
    whole = trainer.generate(queries[0], max_new_tokens=6, return_prompt=True)
    stats = [trainer.step(queries, responses, [1.0, 0.0])]
    bare = [one[1:] for one in respond_to_batch(model, queries, txt_len=4)]
    stats.append(trainer.step(queries, bare, [torch.tensor(0.5)] * 2))
    trainer.save_pretrained(exported)
    trainer.close()
    return greedy, responses, whole, stats


def test_an_encoder_decoder_trains(worlds: Worlds, t5: Path, tmp_path: Path) -> None:
    ((greedy, responses, whole, stats),) = worlds.run(1, script, of_a_t5, (t5, tmp_path / "out"))
    theirs = transformers.AutoModelForSeq2SeqLM.from_pretrained(t5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(t5)
    query = tokenizer("the cat sat", return_tensors="pt")
    expected = theirs.generate(**query, max_new_tokens=5, do_sample=False)
    assert greedy.tolist() == [expected[0].tolist()] * 2
    assert [one[0] for one in (*responses, whole[0])] == [0, 0, 0], "the start token"
    assert all(2 <= len(one) <= 7 for one in (*responses, whole[0]))
    assert stats[0]["objective/kl"] == pytest.approx(0.0, abs=1e-6)
    assert stats[1]["objective/kl"] != 0.0
    after = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").state_dict()
    changed = {
        name.split(".")[-2] for name, value in theirs.state_dict().items() if not torch.equal(value, after[name])
    }
    assert changed == {"q", "v"}, "the adapter is merged"


def of_the_wrong_kind(gpt2: Path, t5: Path) -> list[MegarlError]:
    found = []
    for kind, folder in ((AutoModelForCausalLMWithValueHead, t5), (AutoModelForSeq2SeqLMWithValueHead, gpt2)):
        try:
            PPOTrainer(PPOConfig(batch_size=1, mini_batch_size=1), kind.from_pretrained(folder))
        except MegarlError as problem:
            found.append(problem)
    return found


def test_a_model_of_the_other_kind_is_refused_with_the_right_class(worlds: Worlds, gpt2: Path, t5: Path) -> None:
    (errors,) = worlds.run(1, script, of_the_wrong_kind, (gpt2, t5))
    for error, folder, name in zip(
        errors,
        (t5, gpt2),
        ("AutoModelForSeq2SeqLMWithValueHead", "AutoModelForCausalLMWithValueHead"),
        strict=True,
    ):
        assert_refusal(error, key="from_pretrained", value=str(folder), names=(name,))


def with_lora(lora: Any, **others: Any) -> AutoModelForCausalLMWithValueHead:
    return AutoModelForCausalLMWithValueHead.from_pretrained("gpt2", peft_config=lora, **others)


def test_a_lora_config_becomes_keys() -> None:
    lora = SimpleNamespace(r=4, lora_alpha=16, lora_dropout=0.0, target_modules={"v", "q"}, use_dora=True)
    assert with_lora(lora, load_in_8bit=True).settings == [
        "adapter.kind=dora",
        "adapter.rank=4",
        "adapter.alpha=16",
        "adapter.dropout=0.0",
        "adapter.rslora=false",
        "adapter.targets=[q,v]",
        "adapter.base_bits=8",
    ]
    default_config("ppo", *with_lora({"r": 2}).settings)  # they are keys of megarl


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
        (lambda trainer: with_lora({"target_modules": ".*q_proj"}), ConfigError, "peft_config.target_modules"),
        (lambda trainer: with_lora(None, load_in_4bit=True), ConfigError, "load_in_4bit"),
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
