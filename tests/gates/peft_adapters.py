"""Adapters by PEFT, for test_adapters_peer.py, which runs this with the interpreter of an environment that has PEFT. It
imports nothing of megarl.

    python peft_adapters.py make JOB.json       adapters of PEFT, with their logits and merged weights
    python peft_adapters.py load JOB.json       logits of adapters in folders
    python peft_adapters.py train JOB.json      losses of AdamW steps from adapters in folders

A job is a list of cases: {"base": folder, "folder": of the adapter, "tokens": file, "scores": whether it is a reward
model, ...}. What is found lies in the adapter's folder: logits.pt, merged.pt, losses.pt.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification


def base_of(case: dict[str, Any]) -> Any:
    if not case.get("scores"):
        both = AutoConfig.from_pretrained(case["base"]).is_encoder_decoder
        kind = AutoModelForSeq2SeqLM if both else AutoModelForCausalLM
        return kind.from_pretrained(case["base"], dtype=torch.float32).eval()
    model = AutoModelForSequenceClassification.from_pretrained(case["base"], num_labels=1, dtype=torch.float32).eval()
    model.config.pad_token_id = 0
    return model


def outputs(model: Any, case: dict[str, Any]) -> Tensor:
    """Logits [rows, time, vocabulary] of the case's tokens, or the scores [rows, time] at every token."""
    tokens = torch.load(case["tokens"])
    with torch.no_grad():
        if not case.get("scores"):
            return logits_of(model, tokens)
        inner = model.get_base_model()
        trunk = getattr(inner, inner.base_model_prefix)
        states = trunk(input_ids=tokens, attention_mask=torch.ones_like(tokens))[0]
        return inner.score(states).squeeze(-1)


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    """Logits [rows, time, vocabulary] of the tokens; of an encoder-decoder, whose encoder reads the first half of each
    row, those that predict the other half."""
    if not model.config.is_encoder_decoder:
        return model(input_ids=tokens, attention_mask=torch.ones_like(tokens)).logits
    prompts, responses = tokens.chunk(2, dim=1)
    start = torch.full_like(responses[:, :1], model.config.decoder_start_token_id)
    return model(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        decoder_input_ids=torch.cat([start, responses[:, :-1]], dim=1),
    ).logits


def make(case: dict[str, Any]) -> None:
    """Save an adapter whose factors, lengths and score head all have random values."""
    torch.manual_seed(case["seed"])
    model = get_peft_model(base_of(case), LoraConfig(**case["config"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
            elif "lora_magnitude_vector" in name:
                parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
            elif parameter.requires_grad and "lora_" not in name:
                parameter.normal_(0, 0.3)
    model.save_pretrained(case["folder"])
    record(model, case)


def load(case: dict[str, Any]) -> None:
    record(PeftModel.from_pretrained(base_of(case), case["folder"]).eval(), case)


def record(model: Any, case: dict[str, Any]) -> None:
    folder = Path(case["folder"])
    torch.save(outputs(model.eval(), case), folder / "logits.pt")
    if not case.get("scores"):
        torch.save(dict(model.merge_and_unload().state_dict()), folder / "merged.pt")


def train(case: dict[str, Any]) -> None:
    """AdamW on fixed batches: {"tokens": [steps, rows, time], "mask": which tokens are targets}."""
    model = PeftModel.from_pretrained(base_of(case), case["folder"], is_trainable=True).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = case["optimizer"]
    optimizer = torch.optim.AdamW(
        trained, settings["lr"], (settings["beta1"], settings["beta2"]), settings["eps"], weight_decay=0.0
    )
    batches = torch.load(case["batches"])
    losses, norms = [], []
    for tokens, mask in zip(batches["tokens"], batches["mask"], strict=True):
        logits = logits_of(model, tokens).float()
        logits = logits if model.config.is_encoder_decoder else logits[:, :-1]
        predicted = logits.shape[1]
        found = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), tokens[:, -predicted:].flatten(), reduction="none"
        )
        targets = mask[:, -predicted:].flatten()
        loss = (found * targets).sum() / targets.sum()
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, settings["clip_grad"])))
        losses.append(loss.item())
        optimizer.step()
    torch.save({"losses": losses, "norms": norms}, Path(case["folder"]) / "losses.pt")


def main() -> None:
    for case in json.loads(Path(sys.argv[2]).read_text()):
        {"make": make, "load": load, "train": train}[sys.argv[1]](case)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
