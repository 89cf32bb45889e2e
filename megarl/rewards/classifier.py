"""A reward function that runs transformers' model for sequence classification, of any architecture, in the scoring
process: `reward.fn=megarl.rewards.classifier:score reward.options.path=FOLDER`."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megarl.errors import CheckpointError, ConfigError
from megarl.models.exchange.formats import open_source, resolve
from megarl.models.exchange.source import Source
from megarl.rewards.reader import RewardReader
from megarl.tokenizers import ByteTokenizer

READS = ("output", "sample", "pair")
GIVES = ("probability", "logit")
KEY = "reward.options.path"
Row = Mapping[str, Sequence[int]]
"""What a model is given of a text: input_ids, and what else its tokenizer makes, such as token_type_ids."""


@dataclass(frozen=True)
class Classifier:
    """A loaded model. `reader` says how a causal reward model reads a response; None for other architectures.

    `mean` and `std` are those of a reward model's scores on its reference set.
    """

    model: Any
    tokenizer: Any
    reader: RewardReader | None
    mean: float = 0.0
    std: float = 1.0

    def logits(self, rows: Sequence[Row]) -> Tensor:
        """Return the logits [rows, labels] of encoded texts."""
        if self.reader is None:
            if self.tokenizer.pad_token is None or self.model.config.pad_token_id is None:  # nothing can be padded
                alone = [{name: torch.tensor([[*values]]) for name, values in row.items()} for row in rows]
                return torch.cat([self._forward(**inputs) for inputs in alone])
            return self._forward(**self.tokenizer.pad([dict(row) for row in rows], return_tensors="pt"))
        texts = [row["input_ids"] for row in rows]
        # Causal models read the last token that is not padding: so padding must be a token that no row has.
        used = {token for text in texts for token in text}
        pad = next(token for token in range(len(used) + 1) if token not in used)
        if pad >= self.model.config.vocab_size and len(rows) > 1:
            return torch.cat([self.logits([row]) for row in rows])
        self.model.config.pad_token_id = None if len(rows) == 1 else pad
        width = max(map(len, texts))
        mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts])
        tokens = torch.tensor([[*text, *[pad] * (width - len(text))] for text in texts])
        return self._forward(input_ids=tokens, attention_mask=mask)

    def _forward(self, **inputs: Tensor) -> Tensor:
        """Run the model on what it takes of the inputs: not every model tells the segments of a pair apart."""
        known = set(inspect.signature(self.model.forward).parameters)
        if getattr(self.model.config, "type_vocab_size", 2) < 2:
            known.discard("token_type_ids")
        given = {name: tensor.to(self.model.device) for name, tensor in inputs.items() if name in known}
        with torch.no_grad():
            found: Tensor = self.model(**given).logits
        return found.float().cpu()


def score(
    prompts: Sequence[str],
    outputs: Sequence[str],
    *,
    path: str,
    label: str | int | None = None,
    reads: str = "output",
    gives: str = "probability",
    batch_size: int = 16,
    device: str = "cpu",
    **_: Any,
) -> list[float]:
    """Return the score of each response.

    Args:
        path: folder or hub name of the model.
        label: name or number of the label whose probability or logit is the score. None for a model with one label,
            whose logit is the score.
        reads: what an encoder is given: the output alone, the sample as one text, or prompt and output as a pair. A
            causal model of a known family reads both, as `reward.model` does.
        gives: probability or logit, of a model with several labels. Labels that exclude each other share a probability
            of 1; those of a multi_label_classification have each their own.
        batch_size: texts in a forward pass.
        device: where the model runs, such as cuda:0 with reward.calls.devices=0.
    """
    for name, value, offered in (("reads", reads, READS), ("gives", gives, GIVES)):
        if value not in offered:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(offered)}")
    classifier = _load(path, device)
    column = _column(classifier.model.config, label, path)
    is_multi_label = getattr(classifier.model.config, "problem_type", None) == "multi_label_classification"
    rows = list(_rows(classifier, prompts, outputs, reads))
    found: list[float] = []
    for first in range(0, len(rows), batch_size):
        logits = classifier.logits(rows[first : first + batch_size])
        if logits.shape[1] > 1 and gives == "probability":
            logits = logits.sigmoid() if is_multi_label else logits.softmax(dim=1)
        found += ((logits[:, column] - classifier.mean) / classifier.std).tolist()
    return found


@cache
def _load(path: str, device: str) -> Classifier:
    import transformers

    folder = resolve(path)
    source: Source | None = None
    with suppress(CheckpointError):  # another architecture, or several labels
        source = open_source(folder)
    if source is not None and source.model.encoder is not None:
        raise ConfigError(
            f"path={path} is an encoder-decoder with a score head, for which transformers has no class: set "
            f"reward.model={path} instead",
            key="path",
            value=path,
            offers={"reward.model": [path]},
        )
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).to(device).eval()
    if source is None:
        return Classifier(model, transformers.AutoTokenizer.from_pretrained(folder), None)
    return Classifier(
        model, None, RewardReader(source, ByteTokenizer(), key=KEY), *(source.score_moments or (0.0, 1.0))
    )


def _rows(classifier: Classifier, prompts: Sequence[str], outputs: Sequence[str], reads: str) -> Iterator[Row]:
    for number, (prompt, output) in enumerate(zip(prompts, outputs, strict=True)):
        if classifier.reader is not None:
            yield {"input_ids": classifier.reader.of_text(prompt, output, f"sample {number}")}
        elif reads == "pair":
            yield classifier.tokenizer(prompt, output, truncation=True)
        else:
            yield classifier.tokenizer(output if reads == "output" else prompt + output, truncation=True)


def _column(config: Any, label: str | int | None, path: str) -> int:
    """Return the index of a label."""
    names = {int(number): name for number, name in config.id2label.items()}
    if label is None and len(names) == 1:
        return 0
    found = [number for number, name in names.items() if label in (number, name)]
    if not found:
        raise ValueError(f"label={label!r}: {path} has the labels {', '.join(names.values())}: name one of them")
    return found[0]
