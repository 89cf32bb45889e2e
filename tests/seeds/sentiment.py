"""The example of the first trlX README. Other than there: the imports, a model of our own instead of a classifier from
the hub, reviews in this file instead of imdb, and no wandb.watch."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils.data import DataLoader

from megarl.compat.trlx import (
    AcceleratePPOModel,
    BasePipeline,
    BaseRLModel,
    PPOOrchestrator,
    PromptBatch,
    PromptElement,
    TRLConfig,
    get_model,
    get_orchestrator,
    get_pipeline,
    register_datapipeline,
    register_orchestrator,
)

REVIEWS = ["I loved this film", "A dull plot", "Wonderful", "Not a good film, and too long", "Bad", "The best of all"]


@register_datapipeline
class PPOPipeline(BasePipeline):
    def __init__(self, tokenizer, config, prompt_dataset_path=None):
        super().__init__()

        ds = [{"review": text} for text in REVIEWS]
        ds = [x for x in ds if len(x["review"]) < 500]

        self.tokens = [
            tokenizer(
                x["review"],
                truncation=True,
                padding="max_length",
                max_length=config.train.input_size,
                return_tensors="pt",
            )["input_ids"]
            .long()
            .flatten()
            for x in ds
        ]
        self.text = [tokenizer.decode(tokens.tolist()) for tokens in self.tokens]

    def __getitem__(self, index: int) -> PromptElement:
        return PromptElement(self.text[index], self.tokens[index])

    def __len__(self) -> int:
        return len(self.text)

    def create_loader(
        self, batch_size: int, shuffle: bool, prep_fn: Callable | None = None, num_workers: int = 0
    ) -> DataLoader:
        def collate_fn(elems: Iterable[PromptElement]) -> PromptElement:
            return PromptBatch([elem.text for elem in elems], torch.stack([elem.tokens for elem in elems]))

        return DataLoader(self, batch_size, shuffle, collate_fn=collate_fn, num_workers=num_workers)


def sentiment_pipeline(texts: list[str], batch_size: int) -> list[list[dict[str, float]]]:
    """Stands in for a classifier: the share of vowels."""
    return [
        [{"score": 0.0}, {"score": sum(letter in "aeiou" for letter in text) / max(len(text), 1)}] for text in texts
    ]


@register_orchestrator
class PPOSentimentOrchestrator(PPOOrchestrator):
    def __init__(self, pipeline: PPOPipeline, rl_model: BaseRLModel, chunk_size=512):
        super().__init__(pipeline, rl_model, chunk_size)
        self.sentiment_pipe = sentiment_pipeline

    def score(self, texts):
        """
        Batched scoring function taking text and generating scalar
        """
        sent_kwargs = {"batch_size": self.chunk_size}
        pipe_outputs = self.sentiment_pipe(texts, **sent_kwargs)
        return torch.tensor([output[1]["score"] for output in pipe_outputs])


def main(path: str) -> list[dict[str, Any]]:
    cfg = TRLConfig.load_yaml(path)

    model: AcceleratePPOModel = get_model(cfg.model.model_type)(cfg)

    pipeline: PPOPipeline = get_pipeline(cfg.train.pipeline)(model.tokenizer, cfg)
    orch: PPOSentimentOrchestrator = get_orchestrator(cfg.train.orchestrator)(pipeline, model, cfg.method.chunk_size)
    orch.make_experience(cfg.method.num_rollouts)
    model.learn()

    return model.trained.history
