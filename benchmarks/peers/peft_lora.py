"""Training steps of PEFT's adapters on a transformers model, for benchmarks/adapters.py, which runs this with the
interpreter of an environment that has PEFT. It imports nothing of megarl. Takes lora or dora and a file with the job.
Prints one line of JSON about the model, and one after every step until it is ended.

Where PEFT leaves a choice it is made in PEFT's favour: no checkpointing of activations, and the fused AdamW over the
adapters alone.
"""

import json
import sys
import time
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    kind, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    base = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32, use_cache=False)
    config = LoraConfig(
        r=job["rank"],
        lora_alpha=job["alpha"],
        lora_dropout=0.0,
        target_modules="all-linear",
        use_dora=kind == "dora",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=job["lr"], weight_decay=0.0, fused=True)
    tokens = torch.tensor(job["tokens"])
    versions = f"peft {peft.__version__}, torch {torch.__version__}, transformers {transformers.__version__}"
    print(json.dumps({"trained": sum(parameter.numel() for parameter in trained), "versions": versions}), flush=True)
    while True:
        begun = time.process_time()
        optimizer.zero_grad(set_to_none=True)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        print(json.dumps({"cpu": time.process_time() - begun, "loss": float(loss.detach())}), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
