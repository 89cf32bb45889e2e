"""`export.hf` and `export.peft`: the trained model, and its adapter, written after the last planned step."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from megarl.callbacks.trainer_state import planned_steps, steps_taken
from megarl.disk import local
from megarl.logging import get_logger
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.export import export
from megarl.models.exchange.peft import export_adapter

log = get_logger(__name__)


class Export(Callback):
    """Exports the policy of a module that has a `card`. A run that stopped early exports once a resume finishes it."""

    def __init__(self, hf: str | Path | None = None, peft: str | Path | None = None) -> None:
        self.hf, self.peft = (None if folder is None else local(folder).absolute() for folder in (hf, peft))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export the policy, unless the run stopped early."""
        planned = planned_steps(trainer)
        if trainer.should_stop and (planned is None or steps_taken(trainer) < planned):
            log.warning(
                "training stopped early: nothing is exported to %s until a resume finishes the run",
                " and ".join(str(folder) for folder in (self.hf, self.peft) if folder is not None),
            )
            return
        card: Any = pl_module.card
        assert isinstance(card, ModelCard)
        engines: Any = pl_module.engines
        if self.hf is not None:
            export(
                engines["policy"],
                self.hf,
                model=card.model,
                vocab_size=card.vocab_size,
                family=card.family,
                tokenizer=card.tokenizer,
                chat_template=card.chat_template,
                score_moments=card.score_moments,
                reward_kind=card.reward_kind,
            )
        if self.peft is not None:
            assert card.adapter is not None
            export_adapter(
                engines["policy"], self.peft, model=card.model, base=card.adapter.base, tokenizer=card.tokenizer
            )
