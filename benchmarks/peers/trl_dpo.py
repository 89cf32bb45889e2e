"""Steps of TRL's DPO trainer, for benchmarks/dpo.py, which runs this with the interpreter of an environment that has
TRL. It imports nothing of megarl. Takes resident or cached and a file with the job, prints one line of JSON.

Where TRL leaves a choice it is made in TRL's favour: no checkpointing of activations, and its default optimizer, the
fused AdamW.
"""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer


class Timed(DPOTrainer):
    """Adds up the CPU seconds in which log-probs of the reference are computed before training."""

    once = 0.0

    def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Dataset:
        begun = time.process_time()
        found = super()._precompute_ref_logps(*arguments, **named)
        self.once += time.process_time() - begun
        return found


class Marks(TrainerCallback):
    """The clock at the end of every step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.cpu.append(time.process_time())


def main() -> None:
    reference, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    marks = Marks()
    with tempfile.TemporaryDirectory() as folder:
        config = DPOConfig(
            output_dir=folder,
            beta=job["beta"],
            precompute_ref_log_probs=reference == "cached",
            learning_rate=job["lr"],
            adam_beta2=job["beta2"],
            lr_scheduler_type="constant",
            warmup_steps=0,
            weight_decay=0.0,
            max_grad_norm=1.0,
            per_device_train_batch_size=job["pairs"],
            max_steps=job["warm_up"] + job["steps"],
            train_sampling_strategy="sequential",
            gradient_checkpointing=False,
            use_cpu=True,
            bf16=False,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Timed(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            args=config,
            train_dataset=Dataset.from_list([json.loads(line) for line in Path(job["data"]).read_text().splitlines()]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[marks],
        )
        trainer.train()
    found = {
        "cpu": [after - before for before, after in zip(marks.cpu, marks.cpu[1:], strict=False)],
        "once": trainer.once,
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "versions": f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    print(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
