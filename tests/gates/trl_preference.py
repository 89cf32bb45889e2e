"""Losses of TRL's preference trainers and its reward trainer, for test_preference_peer.py and
test_reward_model_peer.py, which run this with the interpreter of an environment that has TRL. It imports nothing of
megarl.

    python trl_preference.py JOB.json RESULT.json

The job is {"model": folder, "data": {name: file.jsonl}, "common": settings of every trainer, "cases": {name: case}}.
A case is {"trainer": DPO, KTO, ORPO, CPO or Reward, "data": name, "settings": {...}}, and may have its
own "model". The result has the version of TRL, and for each case a list of metrics, step by step.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

TRAINERS = {
    "DPO": (DPOConfig, DPOTrainer),
    "KTO": (KTOConfig, KTOTrainer),
    "ORPO": (ORPOConfig, ORPOTrainer),
    "CPO": (CPOConfig, CPOTrainer),
    "Reward": (RewardConfig, RewardTrainer),
}


def metrics(case: dict[str, Any], job: dict[str, Any]) -> list[dict[str, float]]:
    """Train, and return what was logged in each step."""
    config, trainer_class = TRAINERS[case["trainer"]]
    folder_of_model = case.get("model", job["model"])
    models = AutoModelForSequenceClassification if case["trainer"] == "Reward" else AutoModelForCausalLM
    records = [json.loads(line) for line in Path(job["data"][case["data"]]).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=models.from_pretrained(folder_of_model, dtype=torch.float32),
            args=config(output_dir=folder, **job["common"], **case["settings"]),
            train_dataset=Dataset.from_list(records),
            processing_class=AutoTokenizer.from_pretrained(folder_of_model),
        )
        trainer.train()
        return [entry for entry in trainer.state.log_history if "loss" in entry]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    found = {name: metrics(case, job) for name, case in job["cases"].items()}
    Path(sys.argv[2]).write_text(json.dumps({"version": trl.__version__, "cases": found}))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
