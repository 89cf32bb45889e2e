"""What surrounds the training of a T5: adapters and exports, reward models in process and served, the programs that
generate, and the Python interfaces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import T5ForConditionalGeneration

import megarl
from megarl import convert, training
from megarl.config.compose import compose
from tests.e2e.encoder_decoders import run, save_model
from tests.e2e.every_algorithm import ALGORITHMS, SHARED, write_data
from tests.e2e.runs import assert_same_bits, final_tensors, launched, metrics
from tests.e2e.test_evaluate import evaluate
from tests.e2e.test_serve_reward import check_answers, check_end, serving
from tests.e2e.test_train_rm import scores_in_process
from tests.gated import gated
from tests.models.exchange.published import stored
from tests.rollout.test_entry import entry, lines
from tests.test_session import MEASURED, phase
from tests.worlds import Worlds

SAVED = ["checkpoint.save_last=true", "checkpoint.async_save=false"]
ADAPTER = ["adapter.rank=2", "adapter.kind=dora", "adapter.targets=[q,v,wi_1,EncDecAttention.o]"]
LAYOUTS = {
    "TP2+SP": (2, ["parallel.tp=2", "parallel.sequence_parallel=true"]),
    "PP2": (2, ["parallel.pp=2"]),
    "TP2xPP2": (4, ["parallel.tp=2", "parallel.pp=2"]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a T5 1.1 and data of every kind."""
    root = tmp_path_factory.mktemp("t5")
    save_model(root / "model")
    write_data(root)
    return root


def close(ours: Any, theirs: Any) -> None:
    """Metrics of steps are those of another run."""
    for one, other in zip(ours, theirs, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=2e-6)


# --- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_the_same_tensors_in_every_layout_and_goes_on_in_another(
    worlds: Worlds, folder: Path, tmp_path: Path
) -> None:
    """Also the tables of relative positions, whose heads are spread over ranks."""
    steps = "trainer.max_steps={}"
    worlds.run(1, run, tmp_path / "one", "sft", folder, *SAVED, steps.format(2))
    worlds.run(2, run, tmp_path / "two", "sft", folder, *SAVED, steps.format(2), *LAYOUTS["TP2+SP"][1])
    alone, spread = (final_tensors(tmp_path / name) for name in ("one", "two"))
    weights = [name for name in alone if "optimizer" not in name]
    assert any("relative_positions" in name for name in weights)
    for name in weights:
        rows = min(len(alone[name]), len(spread[name]))  # a vocabulary has more padding for two ranks
        torch.testing.assert_close(spread[name][:rows], alone[name][:rows], rtol=1e-4, atol=1e-5)
    worlds.run(1, run, tmp_path / "one", "sft", folder, *SAVED, steps.format(3))
    worlds.run(2, run, tmp_path / "two", "sft", folder, *SAVED, steps.format(3), *LAYOUTS["PP2"][1])
    close(metrics(tmp_path / "two", "train/loss")[-1:], metrics(tmp_path / "one", "train/loss")[-1:])


# --- adapters and exports ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(worlds: Worlds, folder: Path) -> Path:
    """A folder with a run of PPO with adapters, and what it exports as `peft` and `hf`."""
    root = folder / "adapted"
    exports = [f"export.peft={root / 'peft'}", f"export.hf={root / 'hf'}"]
    worlds.run(1, run, root / "run", "ppo", folder, *ADAPTER, *SAVED, *exports)
    return root


@pytest.mark.parametrize("layout", gated(["TP2+SP", "PP2"], ["PP2"]))
def test_adapters_take_the_same_steps_in_every_layout(
    layout: str, worlds: Worlds, folder: Path, adapted: Path, tmp_path: Path
) -> None:
    names = ALGORITHMS["ppo"][1]
    size, overrides = LAYOUTS[layout]
    worlds.run(size, run, tmp_path, "ppo", folder, *ADAPTER, *overrides)
    close(metrics(tmp_path, *names), metrics(adapted / "run", *names))


def test_the_reference_of_an_adapted_policy_is_the_policy_without_adapters(adapted: Path) -> None:
    (first,), *later = metrics(adapted / "run", "rollout/kl")
    assert first == 0.0
    assert all(kl != 0.0 for (kl,) in later)


def test_an_adapted_run_cut_in_two_ends_in_the_same_weights(
    worlds: Worlds, folder: Path, adapted: Path, tmp_path: Path
) -> None:
    for phases in (1, 3):
        worlds.run(1, run, tmp_path, "ppo", folder, *ADAPTER, *SAVED, f"trainer.max_phases={phases}")
    assert_same_bits(final_tensors(tmp_path), final_tensors(adapted / "run"))


def converted(*commands: list[str]) -> list[int]:
    return [convert.run(words) for words in commands]


def test_what_a_run_exports_is_what_its_checkpoint_and_its_adapter_convert_to(
    worlds: Worlds, folder: Path, adapted: Path, tmp_path: Path
) -> None:
    """Both the adapter of the checkpoint and PEFT's folder, merged, are the exported model; transformers loads it."""
    commands = [
        [f"from={adapted / 'run'}", f"to={tmp_path / 'merged'}"],
        [f"from={folder / 'model'}", f"adapter={adapted / 'peft'}", f"to={tmp_path / 'also'}", "format=huggingface"],
        [f"from={adapted / 'run'}", f"to={tmp_path / 'peft'}", "format=peft"],
    ]
    assert worlds.run(1, converted, *commands) == [[0, 0, 0]]
    base, exported = stored(folder / "model"), stored(adapted / "hf")
    for name in ("merged", "also"):
        found = stored(tmp_path / name)
        assert found.keys() == exported.keys() == base.keys()
        for key, value in exported.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-6)
    changed = {key.split(".")[-2] for key in base if not torch.equal(base[key], exported[key])}
    assert changed == {"q", "v", "wi_1", "o"}
    config = json.loads((adapted / "peft" / "adapter_config.json").read_text())
    assert config == json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["target_modules"] == ["EncDecAttention.o", "q", "v", "wi_1"]
    T5ForConditionalGeneration.from_pretrained(adapted / "hf")


def test_an_adapter_is_trained_further_and_beside_quantised_weights(
    worlds: Worlds, folder: Path, adapted: Path, tmp_path: Path
) -> None:
    """The first step of a run that starts from it has the loss of the model that it makes."""
    settings = ["trainer.max_steps=1"]
    worlds.run(1, run, tmp_path / "whole", "sft", folder, f"model.path={adapted / 'hf'}", *settings)
    further = [f"adapter.path={adapted / 'peft'}", *settings]
    worlds.run(1, run, tmp_path / "further", "sft", folder, *further)
    close(metrics(tmp_path / "further", "train/loss"), metrics(tmp_path / "whole", "train/loss"))
    worlds.run(1, run, tmp_path / "qlora", "sft", folder, *further, "adapter.base_bits=4")
    ((found,),) = metrics(tmp_path / "qlora", "train/loss")
    ((wanted,),) = metrics(tmp_path / "whole", "train/loss")
    assert found == pytest.approx(wanted, rel=0.05)
    assert found != wanted


# --- reward models ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(worlds: Worlds, folder: Path) -> Path:
    """The run folder of a reward model, with the scores of its last evaluation and an export beside it."""
    run_dir = folder / "reward" / "run"
    evaluated = [f"data.eval=[{folder / 'pairs.jsonl'}]", "trainer.eval_every=3", "rm.normalise=true"]
    settings = [*evaluated, f"export.hf={run_dir.parent / 'hf'}"]
    worlds.run(1, run, run_dir, "rm", folder, *SAVED, *settings)
    return run_dir


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("ends_prompts", [True, False], ids=["of a T5", "of a GPT"])
def test_scores_in_process_are_those_of_its_evaluation(
    ends_prompts: bool, tp: int, pp: int, worlds: Worlds, reward_model: Path
) -> None:
    """The encoder reads the prompt of a policy's response, whether the policy has an encoder or not."""
    records = read(reward_model / "scores.jsonl")
    for name in ("run/checkpoints", "hf"):
        stored_model = reward_model.parent / name
        mean, std = (
            json.loads((reward_model.parent / "hf" / "config.json").read_text())[f"score_{key}"]
            for key in ("mean", "std")
        )
        wanted = [(one["score"] - mean) / std for one in records]
        for rank in worlds.run(
            tp * pp, scores_in_process, stored_model, tp, pp, records, None, ends_prompts=ends_prompts
        ):
            assert rank == pytest.approx(wanted, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("layout", gated(["TP2+SP", "TP2xPP2"], ["TP2+SP", "TP2xPP2"]))
def test_ppo_against_a_reward_model_is_the_same_in_every_layout(
    layout: str, worlds: Worlds, folder: Path, reward_model: Path, tmp_path: Path
) -> None:
    size, overrides = LAYOUTS[layout]
    settings = ["reward.fn=null", "trainer.max_phases=2", "critic.kind=separate"]
    for name, world, more in (
        ("one", 1, [f"reward.model={reward_model}", f"critic.separate.path={reward_model}"]),
        ("other", size, [f"reward.model={reward_model.parent / 'hf'}", *overrides]),
    ):
        critic = [f"critic.separate.path={reward_model}"] if name == "other" else []
        worlds.run(world, run, tmp_path / name, "ppo", folder, *settings, *more, *critic)
    names = ("rollout/score", "policy/loss", "value/loss", "train/grad_norm")
    close(metrics(tmp_path / "other", *names), metrics(tmp_path / "one", *names))


@pytest.mark.gate
def test_scores_over_http_are_those_in_process(worlds: Worlds, reward_model: Path) -> None:
    with serving(reward_model, "serve.max_tokens=200", "serve.batch_size=4") as server:
        check_answers(server, reward_model, worlds, 1e-5)
        check_end(server, 15)


# --- programs that generate -------------------------------------------------------------------------------------------


def test_a_chat_answers_each_turn_and_the_same_in_every_layout(worlds: Worlds, folder: Path) -> None:
    settings = ["chat=true", f"model.path={folder / 'model'}"]
    both, first = (worlds.run(1, entry, settings, said)[0] for said in ("hello\nand then?\n", "hello\n"))
    assert both.startswith(first)
    assert len(both) > len(first) > 1
    plain = worlds.run(1, entry, [*settings, "plain=true"], "hello\n")[0]
    assert plain != first
    assert worlds.run(2, entry, [*settings, "parallel.tp=2"], "hello\n") == [first, ""]


def test_generation_gives_the_same_lines_in_every_layout(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    asked = [{"prompt": "abc"}, {"messages": [{"role": "user", "content": "Hello"}]}, {"prompt": "a longer prompt"}]
    prompts.write_text("".join(json.dumps(one) + "\n" for one in asked))
    found = []
    for name, size, layout in (("one", 1, []), ("two", 2, ["parallel.tp=2"]), ("four", 4, LAYOUTS["TP2xPP2"][1])):
        out = tmp_path / f"{name}.jsonl"
        settings = [f"model.path={folder / 'model'}", f"prompts={prompts}", f"out={out}", "rollout.n=2"]
        worlds.run(size, entry, [*settings, *layout])
        found.append([line | {"logprob": round(line["logprob"], 3)} for line in lines(out)])
    assert found[0] == found[1] == found[2]
    assert len(found[0]) == 6
    assert found[0][0]["response"] != found[0][1]["response"]


def test_an_evaluation_gives_the_same_measures_in_every_layout(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    found = []
    for name, size, layout in (("one", 1, []), ("four", 4, LAYOUTS["TP2xPP2"][1])):
        (tmp_path / name).mkdir()
        settings = [
            f"model.path={folder / 'model'}",
            f"data.eval=[{folder / 'prompts.jsonl'}]",
            f"run.dir={tmp_path / name}",
            f"samples={tmp_path / name / 'samples.jsonl'}",
            "reward.fn=megarl.rewards.builtin:length",
            "eval.n=2",
            "rollout.max_new_tokens=6",
            *layout,
        ]
        found.append(worlds.run(size, evaluate, settings)[0])
    assert found[0]["metrics"] == pytest.approx(found[1]["metrics"], abs=1e-6)
    assert found[0]["responses"] == 48
    one, four = (read(tmp_path / name / "samples.jsonl") for name in ("one", "four"))
    assert [line["response"] for line in one] == [line["response"] for line in four]


@pytest.mark.gate
def test_a_masked_policy_takes_the_same_steps_in_every_layout(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    """NLPO, whose second model reads the prompts with its encoder, too."""
    masked = ["ppo.action_mask.top_p=0.7", "rollout.stop=[e]", "rollout.repetition_penalty=1.2", "trainer.max_phases=2"]
    names = (*ALGORITHMS["ppo"][1], "rollout/allowed_tokens")
    worlds.run(1, run, tmp_path / "one", "ppo", folder, *masked)
    worlds.run(2, run, tmp_path / "two", "ppo", folder, *masked, *LAYOUTS["TP2+SP"][1])
    wanted = metrics(tmp_path / "one", *names)
    close(metrics(tmp_path / "two", *names), wanted)
    assert all(1 < found[-1] < 262 for found in wanted)


# --- from Python ------------------------------------------------------------------------------------------------------


def settings_of(folder: Path, run_dir: Path) -> list[str]:
    own = [setting.format(data=folder) for setting in ALGORITHMS["ppo"][0]]
    return [*SHARED, f"model.path={folder / 'model'}", *own, f"run.dir={run_dir}", "trainer.max_phases=2"]


def trained(folder: Path, run_dir: Path) -> None:
    with launched():
        assert training.train("ppo", compose("ppo", settings_of(folder, run_dir))[0]) == 0


def stepped(folder: Path, run_dir: Path, *more: str) -> dict[str, Any]:
    """The same loop, step by step; then responses that were made elsewhere, a checkpoint, and an export."""
    with launched(), megarl.Session(megarl.default_config("ppo", *settings_of(folder, run_dir), *more)) as session:
        found: dict[str, Any] = {"phases": [phase(session) for _ in range(2)]}
        (one,) = session.responses(["abc"], ["de"])
        found["given"] = one.tokens
        rows = session.forward([one])
        found["logprobs"] = rows["old_logprobs"]
        session.advantages(rows, [1.0])
        session.end_phase()
        greedy = session.sample(["abc", [*b"abc", 257]], 1, temperature=0.0)
        found["greedy"] = [each.response for each in greedy]
        found["text"] = session.text(greedy[0])
        session.save_pretrained(run_dir.parent / "exported")
    return found


@pytest.mark.gate
def test_a_session_computes_what_train_ppo_computes(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "two").mkdir()
    worlds.run(1, trained, folder, tmp_path / "run")
    (alone,) = worlds.run(1, stepped, folder, tmp_path / "alone" / "run")
    two = worlds.run(2, stepped, folder, tmp_path / "two" / "run", "parallel.tp=2")
    wanted = metrics(tmp_path / "run", *MEASURED)
    for found in (alone, *two):
        close([[one[name] for name in MEASURED] for one in found["phases"]], wanted)
    eos = 257
    assert alone["given"] == [*b"abc", eos, *b"de", eos]
    assert alone["greedy"] == two[0]["greedy"]
    assert alone["greedy"][0] == alone["greedy"][1], "of a text and of its tokens"
    torch.testing.assert_close(two[1]["logprobs"], alone["logprobs"], rtol=1e-4, atol=1e-4)
    theirs = T5ForConditionalGeneration.from_pretrained(tmp_path / "alone" / "exported")
    asked = torch.tensor([[*b"abc", eos]])
    expected = theirs.generate(asked, max_new_tokens=7, do_sample=False, eos_token_id=eos)
    assert expected[0, 1:].tolist() == alone["greedy"][0]


def in_one_call(folder: Path, run_dir: Path) -> dict[str, Any]:
    """`megarl.train` on pairs of texts, and what its result does."""
    config = megarl.default_config("sft", *SHARED, "trainer.max_steps=1", "data.seq_length=32", *SAVED)
    config.run.dir, config.adapter.rank = str(run_dir), 2
    with launched():
        made = megarl.train(folder / "model", samples=[["abc", "de"], ["bcd", "ea"]] * 4, config=config)
        made.save_pretrained(run_dir.parent / "whole")
        made.save_pretrained(run_dir.parent / "adapter", adapter=True)
        scored = made.evaluate(["abc"], reward_fn=lambda outputs, **_: [float(len(one)) for one in outputs], n=2)
        return {
            "texts": made.generate(["abc", "bcd"], temperature=0.0, max_new_tokens=5),
            "several": made.generate("abc", n=2, max_new_tokens=5),
            "scored": scored["responses"],
            "loss": made.history[-1]["train/loss"],
        }


def test_one_call_trains_generates_evaluates_and_saves(worlds: Worlds, folder: Path, tmp_path: Path) -> None:
    (found,) = worlds.run(1, in_one_call, folder, tmp_path / "run")
    assert [type(text) for text in found["texts"]] == [str, str]
    assert len(found["several"][0]) == found["scored"] == 2
    assert found["loss"] > 0
    base, whole = stored(folder / "model"), stored(tmp_path / "whole")
    assert {key for key in base if not torch.equal(base[key], whole[key])}
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
