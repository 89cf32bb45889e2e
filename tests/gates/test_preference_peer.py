"""DPO, KTO, ORPO, CPO and SimPO beside TRL's trainers: the same model, tokens, batches and optimizer give the same
losses, gradient norms and rewards in every one of ten steps."""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import launched, metrics
from tests.gates import trl_settings
from tests.gates.environments import ROOT, run
from tests.models.exchange.published import save_published
from tests.worlds import Worlds

SCRIPT = ROOT / "tests" / "gates" / "trl_preference.py"
STEPS, BATCH = 10, 8
PAD, EOS = "<pad>", "<eos>"
LOSS_TOLERANCE = 1e-4  # relative
VOCABULARY = 300  # of the model; 258 of its tokens are in the tokenizer

# TRL's name: ours. What TRL's trainers call `logps` is a sum here, and a mean over tokens where their loss averages.
NAMES = {
    "grad_norm": "grad_norm",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "margin",
    "logps/chosen": "logprob_chosen",
    "logps/rejected": "logprob_rejected",
    "nll_loss": "nll",
    "kl": "kl",
}
REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/margins")
LOGPROBS = ("logps/chosen", "logps/rejected")


@dataclass(frozen=True)
class Case:
    """An algorithm with its settings on both sides.

    Attributes:
        differs: metrics of TRL that are defined differently there.
    """

    trainer: str
    theirs: dict[str, Any]
    ours: list[str]
    differs: tuple[str, ...] = field(default=())

    @property
    def data(self) -> str:
        return "labelled" if self.trainer == "KTO" else "pairs"


def dpo(kind: str, *ours: str, differs: tuple[str, ...] = (), **theirs: Any) -> Case:
    """A kind of loss with the same name on both sides."""
    return Case("DPO", {"loss_type": [kind], "beta": 0.1, **theirs}, [f"dpo.kind={kind}", *ours], differs)


CASES = {
    "dpo_sigmoid": dpo("sigmoid"),
    "dpo_sigmoid_resident": dpo("sigmoid", "dpo.reference=resident"),
    # TRL's rewards are sums over tokens here too, while its loss and our rewards are means.
    "dpo_ipo": dpo("ipo", differs=REWARDS),
    "dpo_averaged": Case(
        "DPO", {"loss_type": ["sigmoid_norm"], "beta": 2.0}, ["dpo.average_logprobs=true", "dpo.beta=2"], REWARDS
    ),
    "dpo_hinge": dpo("hinge"),
    "dpo_robust": dpo("robust", "dpo.label_smoothing=0.2", label_smoothing=0.2),
    "dpo_exo_pair": dpo("exo_pair", "dpo.label_smoothing=0.01", label_smoothing=0.01),
    "dpo_nca_pair": dpo("nca_pair"),
    "dpo_sppo_hard": dpo("sppo_hard"),
    "dpo_apo_zero": dpo("apo_zero"),
    "dpo_apo_down": dpo("apo_down"),
    "dpo_mix_with_sft": Case(
        "DPO",
        {"loss_type": ["sigmoid", "apo_zero", "sft"], "loss_weights": [0.8, 0.3, 0.5]},
        ["dpo.mix={sigmoid: 0.8, apo_zero: 0.3}", "dpo.sft_coef=0.5"],
    ),
    "kto": Case("KTO", {"beta": 0.1}, []),
    "kto_resident_weighted": Case(
        "KTO",
        {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7},
        ["kto.reference=resident", "kto.beta=0.3", "kto.desirable_weight=1.3", "kto.undesirable_weight=0.7"],
    ),
    "orpo": Case("ORPO", {"beta": 0.5}, ["orpo.beta=0.5"], LOGPROBS),
    "cpo_sigmoid": Case("CPO", {"beta": 0.1}, []),
    "cpo_sigmoid_smoothed": Case(
        "CPO", {"cpo_alpha": 0.5, "label_smoothing": 0.1}, ["cpo.sft_coef=0.5", "cpo.label_smoothing=0.1"]
    ),
    "cpo_hinge": Case("CPO", {"loss_type": "hinge"}, ["cpo.kind=hinge"]),
    "cpo_ipo": Case("CPO", {"loss_type": "ipo"}, ["cpo.kind=ipo"], LOGPROBS),
    # Without the cross entropy TRL logs it as 0.
    "simpo": Case(
        "CPO",
        {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.8, "cpo_alpha": 0.0},
        ["cpo.kind=simpo", "cpo.beta=2", "cpo.gamma=0.8", "cpo.sft_coef=0"],
        (*LOGPROBS, "nll_loss"),
    ),
}

OURS = [
    *trl_settings.OURS,
    f"trainer.max_steps={STEPS}",
    f"trainer.global_batch_size={BATCH}",
    f"trainer.micro_batch_size={BATCH}",
    "trainer.log_every=1",
    "data.shuffle=false",
    "data.seq_length=96",
]
THEIRS = {
    **trl_settings.THEIRS,
    "max_steps": STEPS,
    "per_device_train_batch_size": BATCH,
    "gradient_accumulation_steps": 1,
    "train_sampling_strategy": "sequential",
    "max_length": 96,
}


# --- what both sides are given ----------------------------------------------------------------------------------------


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose tokens are the 256 bytes, padding and EOS."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {text: index for index, text in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS).save_pretrained(folder)


def pairs() -> list[dict[str, str]]:
    """Prompts with two responses, of 3 to 60 characters. The preferred ones have a bias that can be learned."""
    generator = random.Random(5)

    def text(letters: str, longest: int) -> str:
        return "".join(generator.choices(letters, k=generator.randint(3, longest)))

    return [
        {"prompt": text("abcdefgh ", 30), "chosen": text("aeiou mn", 60), "rejected": text("xyzw mnae", 60)}
        for _ in range(STEPS * BATCH)
    ]


def labelled() -> list[dict[str, Any]]:
    """One response of each pair, with three, four or five desirable ones of eight in a batch."""
    generator = random.Random(6)
    labels = [label for step in range(STEPS) for label in _shuffled([1] * (3 + step % 3), BATCH, generator)]
    return [
        {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": bool(label)}
        for pair, label in zip(pairs(), labels, strict=True)
    ]


def _shuffled(ones: list[int], size: int, generator: random.Random) -> list[int]:
    return generator.sample([*ones, *[0] * (size - len(ones))], size)


def reversed_within_batches(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL joins each prompt with the response to the one before it, and we with that to the one after it, as in the
    paper of KTO; reversed, a batch has the same mismatched rows on both sides, and the same loss."""
    return [record for start in range(0, len(records), BATCH) for record in records[start : start + BATCH][::-1]]


def write_records(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


# --- the two sides ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_published("gpt2", folder, vocab_size=VOCABULARY, n_positions=96, bos_token_id=None, eos_token_id=257)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(
    trl_python: Path, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, float]]]:
    """Metrics of all cases under TRL."""
    folder = tmp_path_factory.mktemp("theirs")
    job = {
        "model": str(model),
        "data": {
            "pairs": str(write_records(folder / "pairs.jsonl", pairs())),
            "labelled": str(write_records(folder / "labelled.jsonl", reversed_within_batches(labelled()))),
        },
        "common": THEIRS,
        "cases": {
            name: {"trainer": case.trainer, "data": case.data, "settings": case.theirs} for name, case in CASES.items()
        },
    }
    return run_trl(trl_python, job, folder)


def run_trl(python: Path, job: dict[str, Any], folder: Path) -> dict[str, list[dict[str, float]]]:
    """Metrics of each case of a job under TRL, step by step."""
    (folder / "job.json").write_text(json.dumps(job))
    away = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hub"), "HF_DATASETS_CACHE": str(folder / "datasets")}
    run(python, SCRIPT, folder / "job.json", folder / "found.json", cwd=folder, timeout=1800, **away)
    found: dict[str, list[dict[str, float]]] = json.loads((folder / "found.json").read_text())["cases"]
    return found


def train(entry: str, settings: list[str]) -> None:
    from megarl.config.compose import compose
    from megarl.training import train

    with launched():
        config, _ = compose(entry, settings)
        assert train(entry, config) == 0


def our_metrics(worlds: Worlds, case: Case, model: Path, folder: Path) -> list[dict[str, float]]:
    records = pairs() if case.data == "pairs" else labelled()
    entry = case.trainer.lower()
    cache = [] if entry in ("orpo", "cpo") else [f"{entry}.cache={folder}/cache"]
    data = write_records(folder / "train.jsonl", records)
    settings = [*OURS, *case.ours, *cache, f"model.path={model}", f"data.train=[{data}]", f"run.dir={folder}/run"]
    worlds.run(1, train, entry, settings)
    names = ["loss", *(name for name in NAMES.values() if name != "kl" or entry == "kto")]
    names = [name for name in names if name != "nll" or entry != "kto"]
    rows = metrics(folder / "run", *(f"train/{name}" for name in names))
    return [dict(zip(names, row, strict=True)) for row in rows]


@pytest.mark.gate
@pytest.mark.parametrize("name", CASES)
def test_ten_steps_are_those_of_trl(
    name: str, worlds: Worlds, theirs: dict[str, list[dict[str, float]]], model: Path, tmp_path: Path
) -> None:
    case, expected = CASES[name], theirs[name]
    found = our_metrics(worlds, case, model, tmp_path)
    assert len(found) == len(expected) == STEPS
    losses = [step["loss"] for step in found]
    assert losses == pytest.approx([step["loss"] for step in expected], rel=LOSS_TOLERANCE)
    assert max(losses) - min(losses) > 100 * LOSS_TOLERANCE * abs(losses[0]), "training changes the loss"
    for trl_name, our_name in NAMES.items():
        if trl_name in case.differs or trl_name not in expected[0]:
            continue
        values = [step[our_name] for step in found]
        assert values == pytest.approx([step[trl_name] for step in expected], rel=1e-3, abs=1e-4), trl_name
    if case.trainer == "KTO":
        assert any(step["kl"] > 0.01 for step in found), "the KL estimate takes part"
