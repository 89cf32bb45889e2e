"""Phases of TRL's GRPO trainer, for benchmarks/grpo.py and tests/gates/test_grpo_peer.py, which run this with the
interpreter of an environment that has TRL. It imports nothing of megarl.

    python trl_grpo.py JOB.json RESULT.json

The job is {"model": folder, "prompts": [text, ...], "settings": of the trainer, "letter": what the reward counts,
"worth": its reward for each, 1 if it is missing}. The result has the metrics and CPU seconds of each optimizer step,
the responses of each phase, and the versions.
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
from trl import GRPOConfig, GRPOTrainer


class Marks(TrainerCallback):
    """The clocks at the end of every optimizer step."""

    def __init__(self) -> None:
        self.cpu: list[float] = []
        self.wall: list[float] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.cpu.append(time.process_time())
        self.wall.append(time.perf_counter())


class Recorded(GRPOTrainer):
    """A trainer that keeps the tokens of its responses and what the policy thought of them."""

    responses: list[list[dict[str, Any]]]

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        found = super()._generate_and_score_completions(inputs)
        prompts, mask = found["prompt_ids"], found["completion_mask"]
        tokens = torch.cat([prompts, found["completion_ids"]], dim=1)
        attended = torch.cat([found["prompt_mask"], mask], dim=1)
        logprobs = found.get("old_per_token_logps")
        if logprobs is None:
            with torch.no_grad():
                width = mask.shape[1]
                logprobs, *_ = self._get_per_token_logps_and_entropies(self.model, tokens, attended, width)
        self.responses.append(
            [
                {
                    "prompt": prompt[here.bool()].tolist(),
                    "response": completion[kept.bool()].tolist(),
                    "logprobs": logprob[kept.bool()].tolist(),
                }
                for prompt, here, completion, kept, logprob in zip(
                    prompts, found["prompt_mask"], found["completion_ids"], mask, logprobs, strict=True
                )
            ]
        )
        return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    letter, worth = job["letter"], job.get("worth", 1.0)

    def count(completions: list[str], **_: Any) -> list[float]:
        return [worth * text.count(letter) for text in completions]

    marks = Marks()
    torch.manual_seed(1)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Recorded(
            model=AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            reward_funcs=count,
            args=GRPOConfig(output_dir=folder, **job["settings"]),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in job["prompts"]]),
            processing_class=AutoTokenizer.from_pretrained(job["model"]),
            callbacks=[marks],
        )
        trainer.responses = []
        trainer.train()
    found = {
        "steps": [entry for entry in trainer.state.log_history if "loss" in entry],
        "cpu": marks.cpu,
        "wall": marks.wall,
        "responses": trainer.responses,
        "versions": f"trl {trl.__version__}, torch {torch.__version__}, transformers {transformers.__version__}",
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
