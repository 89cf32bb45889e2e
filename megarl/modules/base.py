"""What every algorithm's module shares: its engines, the one optimizer over them, its cursor, its clock."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from megarl.clock import Clock, Work
from megarl.config import resume
from megarl.config.cluster import PlanConfig
from megarl.config.files import load_chat_template
from megarl.errors import CheckpointError
from megarl.logging import get_logger
from megarl.models.build import build_engine, vocabulary
from megarl.models.exchange.card import ModelCard
from megarl.models.exchange.pretrained import Sources
from megarl.models.roles import Role
from megarl.modules.workload import Workload
from megarl.parallel.all_optimizers import Optimizers
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.rows import Microbatch
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)


class Module(LightningModule):
    """A module whose models are engines over the strategy's grid.

    Subclasses state their models in `roles` and the size of their work in `plan`, both without building anything, and
    fill `engines` from the roles in `configure_model`.

    `consumed` counts the training steps so far and `rows` the rows of data they took, `rows_per_step` each: what a
    resume needs to go on with the next record. `weights_version` counts the steps that changed the policy.

    `entry` is the algorithm's name and `unit` what it calls a step; `run_training` sets both. `planned` is how many
    steps there will be, where that is not the Trainer's to say. `resumes` is set where a checkpoint is about to be
    restored. `samples` are rows of a table that the last evaluation filled.
    """

    entry = ""
    unit = "step"
    planned: int | None = None
    resumes = False

    def __init__(
        self,
        config: Any = None,
        tokenizer: Tokenizer | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        sources: Sources | None = None,
    ) -> None:
        """
        Args:
            config: the tree of the algorithm's entry; None for a module without GPTs.
            tokenizer: of the same tree.
            functions: callables that take the place of those that `reward.fn` and `metric.fn` name.
            sources: stored models that were opened already.
        """
        super().__init__()
        self.automatic_optimization = False
        self.config: Any = config
        self.tokenizer: Any = tokenizer
        self.functions = dict(functions or {})
        self.sources = Sources() if sources is None else sources
        self.engines: dict[str, Engine] = {}
        self.consumed = self.rows = self.weights_version = 0
        self.started_as: dict[str, Any] | None = None  # the configuration of the first run of this one's line
        self.changed: set[str] = set()  # keys that had another value in the run that is resumed
        self.clock = Clock()
        self.work = Work(tokens=0, flops=0.0)
        self.last_batch: list[Microbatch] = []
        self.samples: list[dict[str, Any]] = []
        self.baseline: dict[str, float] = {}  # metrics of an evaluation before the first step
        self.card: ModelCard | None = None  # says in a checkpoint what model it is of
        if config is not None and tokenizer is not None:
            self.vocab_size = vocabulary(config.model, tokenizer)
            self.card = ModelCard.of(
                config.model,
                self.vocab_size,
                tokenizer,
                config.tokenizer,
                load_chat_template(config.data.chat_template),
                self.sources.at(config.model.path),
            )
        self.prepare()

    def prepare(self) -> None:
        """Set up what needs no models and no other processes; the constructor calls it at its end."""

    @staticmethod
    def roles(config: Any, vocab_size: int, sources: Sources) -> list[Role]:
        """Return the models of a run, the policy first."""
        raise NotImplementedError

    @staticmethod
    def plan(config: Any, assumed: PlanConfig) -> Workload:
        """Return the numbers of a unit of work (a phase, or a step): counts of sequences, lengths, steps."""
        raise NotImplementedError

    @property
    def rows_per_step(self) -> int:
        return 1

    @property
    def scorer_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the functions that score responses, by their key."""
        return {}

    @property
    def run_dir(self) -> Path:
        return Path(self.trainer.default_root_dir)

    @property
    def grid(self) -> Grid:
        grid: Grid = self.trainer.strategy.grid  # type: ignore[attr-defined]
        return grid

    def build(self, role: Role, total_steps: int = 0, seed: int | None = None) -> Engine:
        """Build a role's engine on the run's grid.

        Args:
            total_steps: optimizer steps of the whole run.
            seed: of random weights; None for the run's.
        """
        return build_engine(
            role,
            self.grid,
            self.config.parallel,
            precision=self.config.trainer.precision,
            seed=self.config.seed if seed is None else seed,
            total_steps=total_steps,
        )

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return Optimizers(list(self.engines.values()))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Batches stay on the host: engines take what a pass needs."""
        return batch

    def on_train_start(self) -> None:
        """Release the stored models: every model is built, and a resumed run is restored."""
        self.sources.close()

    def close(self) -> None:
        """Release what the module holds outside its engines."""
        self.sources.close()

    def step_optimizers(self) -> dict[str, float]:
        """Move every engine that has gradients; its gradient norm by name. Lightning counts this as one step."""
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        norms: dict[str, float] = optimizer.optimizer.grad_norms  # type: ignore[union-attr]
        return norms

    def advance(self, *, new_weights: bool = True) -> None:
        """Count a training step, and new weights of the policy where it changed them."""
        self.consumed += 1
        self.rows += self.rows_per_step
        self.weights_version += new_weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["consumed"], checkpoint["rows"] = self.consumed, self.rows
        checkpoint["weights_version"] = self.weights_version
        if self.config is not None and self.tokenizer is not None:
            present = asdict(self.config)
            checkpoint["run"] = {
                "entry": self.entry,
                "config": present,
                "started_as": self.started_as or present,
                "tokenizer": self.tokenizer.fingerprint(),
            }
        checkpoint["scorers"] = self.scorer_fingerprints
        checkpoint["clock"] = self.clock.state_dict()
        if self.card is not None:
            checkpoint["model"] = self.card.plain()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Before the weights are restored: those of a run that this one cannot go on from are refused."""
        if "run" in checkpoint and self.tokenizer is not None:
            self._compare(checkpoint["run"], checkpoint.get("model") or {}, checkpoint["folder"])
        self.consumed = checkpoint["consumed"]
        self.rows = checkpoint.get("rows", self.consumed * self.rows_per_step)
        self.weights_version = checkpoint.get("weights_version", self.consumed)
        self.clock.load_state_dict(checkpoint["clock"])

    def _compare(self, saved: dict[str, Any], card: dict[str, Any], folder: str) -> None:
        """Say what differs between this run's configuration and the one that is resumed, or refuse it."""
        if saved["entry"] != self.entry:
            raise CheckpointError(
                f"the checkpoint {folder} is of train_{saved['entry']}, and this is train_{self.entry}: give it as "
                "model.path with run.resume=never, or another run.dir",
                key=f"train_{saved['entry']}",
                where=folder,
                offers={"run.resume": ["never"]},
            )
        self.started_as = saved["started_as"]
        same_tokenizer = saved["tokenizer"] == self.tokenizer.fingerprint()
        same_template = None
        if self.card is not None and "chat_template" in card:  # cards of older versions lack it
            same_template = card["chat_template"] == self.card.chat_template
        found = resume.differences(
            saved["config"],
            saved["started_as"],
            asdict(self.config),
            tree=type(self.config),
            same_tokenizer=same_tokenizer,
            same_template=same_template,
        )
        resume.refuse(found, folder)
        self.changed = {difference.key for difference in found}
        if told := resume.told(found):
            log.warning("this run's settings are not those of the run that it resumes: %s", told)
