"""The base class of all algorithms: the engines, the optimizer that steps them, the progress counters and the
timers."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from megarl.clock import Clock, Work
from megarl.config import resume
from megarl.config.cluster import PlanConfig
from megarl.config.extensions import named_extensions
from megarl.config.files import load_chat_template
from megarl.errors import CheckpointError
from megarl.functions.extensions import changed, fingerprints
from megarl.logging import get_logger
from megarl.models.adapters import frozen_digests
from megarl.models.build import build_engine, vocabulary
from megarl.models.exchange.card import AdapterCard, ModelCard
from megarl.models.exchange.merged import CheckpointAdapter
from megarl.models.exchange.pretrained import Sources
from megarl.models.roles import Role
from megarl.modules.workload import Workload
from megarl.parallel.all_optimizers import Optimizers
from megarl.parallel.digest import digest
from megarl.parallel.engine import Engine
from megarl.parallel.grid import Grid
from megarl.parallel.rows import Microbatch, Rows, RowSource
from megarl.tokenizers import Tokenizer

log = get_logger(__name__)


class Module(LightningModule):
    """A LightningModule whose models are engines on the strategy's process grid.

    A subclass describes its models in `roles` and the size of its work in `plan`; neither builds anything. It fills
    `engines` from the roles in `configure_model`.

    Attributes:
        entry: name of the algorithm; `run_training` sets it.
        unit: what the algorithm calls a training step, for messages; `run_training` sets it.
        planned: training steps of the whole run; None where the Trainer's limit applies.
        resumes: whether a checkpoint is about to be restored.
        steps_done: training steps so far.
        rows_read: data rows that these steps used, `rows_per_step` each; a resume continues with the next row.
        stops_early: whether the run is being stopped before its last step, so that little time may be left to save.
        weights_version: number of the steps that changed the policy.
        samples: rows of the table that the last evaluation filled.
    """

    entry = ""
    unit = "step"
    planned: int | None = None
    resumes = False
    stops_early = False

    def __init__(
        self,
        config: Any = None,
        tokenizer: Tokenizer | None = None,
        functions: Mapping[str, Callable[..., Any]] | None = None,
        sources: Sources | None = None,
    ) -> None:
        """
        Args:
            config: configuration tree of the algorithm; None for a module without GPTs.
            tokenizer: tokenizer of that configuration.
            functions: callables to use instead of the functions that `reward.fn` and `metric.fn` name.
            sources: stored models that are open already.
        """
        super().__init__()
        self.automatic_optimization = False
        self.config: Any = config
        self.tokenizer: Any = tokenizer
        self.functions = dict(functions or {})
        self.sources = Sources() if sources is None else sources
        self.engines: dict[str, Engine] = {}
        self.steps_done = self.rows_read = self.weights_version = 0
        self.started_as: dict[str, Any] | None = None  # configuration of the first run in the chain of resumes
        self.changed: set[str] = set()  # keys whose value differs from the checkpoint's
        self.clock = Clock()
        self.work = Work(tokens=0, flops=0.0)
        self.last_batch: list[Microbatch] = []
        self.samples: list[dict[str, Any]] = []
        self.baseline: dict[str, float] = {}  # metrics of the evaluation before the first step
        self.adapted_roles: dict[str, Role] = {}  # roles with adapters that checkpoints contain, by engine
        self.frozen_checksums: dict[str, dict[str, int]] = {}  # of weights beside adapters, by engine and name
        self.card: ModelCard | None = None  # describes the policy in checkpoints
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
        """Set up what needs neither models nor other processes. The constructor calls this last."""

    @staticmethod
    def roles(config: Any, vocab_size: int, sources: Sources) -> list[Role]:
        """Return the roles of a run's models, the policy first."""
        raise NotImplementedError

    @staticmethod
    def plan(config: Any, assumed: PlanConfig) -> Workload:
        """Return the size of a unit of work (a phase or a step): numbers of sequences, lengths, optimizer steps."""
        raise NotImplementedError

    @property
    def rows_per_step(self) -> int:
        """Number of data rows that a training step uses."""
        return 1

    @property
    def rows_there(self) -> int | None:
        """Number of rows of the data that every epoch goes through; None for prompts, which are answered anew."""
        return None

    @property
    def scorer_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the functions that score responses, by configuration key."""
        return {}

    @property
    def run_dir(self) -> Path:
        """Folder of the run."""
        return Path(self.trainer.default_root_dir)

    @property
    def grid(self) -> Grid:
        """Process grid of the strategy."""
        grid: Grid = self.trainer.strategy.grid  # type: ignore[attr-defined]
        return grid

    def build(self, role: Role, total_steps: int = 0, seed: int | None = None) -> Engine:
        """Build the engine of a role on the run's grid.

        Args:
            role: the model to build.
            total_steps: optimizer steps of the whole run.
            seed: seed of the random weights; None for the run's seed.
        """
        engine = build_engine(
            role,
            self.grid,
            self.config.parallel,
            precision=self.config.trainer.precision,
            seed=self.config.seed if seed is None else seed,
            total_steps=total_steps,
            base=None if role.base is None else self.engines[role.base],
        )
        if role.adapter is not None and role.saved:
            self._describe_adapter(role, engine)
        return engine

    def _describe_adapter(self, role: Role, engine: Engine) -> None:
        """Keep checksums of the weights beside an engine's adapters, which checkpoints do not contain, and describe the
        policy's adapters in its card."""
        self.frozen_checksums[role.name], self.adapted_roles[role.name] = frozen_digests(engine), role
        stored = role.adapter_source
        if isinstance(stored, CheckpointAdapter):
            place = f"adapter.path={stored.path}"
            self._refuse_other_weights(role, stored.base_digests, stored.base_dtype, place)
        if self.card is not None and role.name == "policy":
            adapter = AdapterCard.of(role, self.frozen_checksums[role.name], engine.config.params_dtype)
            self.card = replace(self.card, adapter=adapter)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return one optimizer that steps all engines."""
        return Optimizers(list(self.engines.values()))

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch unchanged: engines copy what a forward pass needs to the device."""
        return batch

    def on_train_start(self) -> None:
        """Close the stored models, as every model is built and a resumed run is restored by now."""
        self.sources.close()

    def close(self) -> None:
        """Release the resources that the module holds outside its engines."""
        self.sources.close()

    def gradients(self, rows: RowSource, indices: Tensor) -> dict[str, float]:
        """Compute the gradients of one optimizer step over the rows at these indices, by the algorithm's loss, and
        return its metrics. `step_optimizers` applies them."""
        raise NotImplementedError

    def rows_at(self, indices: Tensor) -> Rows:
        """Return rows of the training data, with the columns that the loss reads; of algorithms that learn from
        data."""
        raise NotImplementedError

    def step_optimizers(self) -> dict[str, float]:
        """Step every engine that has gradients and return the gradient norms by engine name. Lightning counts this as
        one step."""
        optimizer = self.optimizers()
        optimizer.step()  # type: ignore[union-attr]
        norms: dict[str, float] = optimizer.optimizer.grad_norms  # type: ignore[union-attr]
        return norms

    def advance(self, *, new_weights: bool = True, rows: int | None = None) -> None:
        """Count a training step, and with `new_weights` a new version of the policy's weights.

        Args:
            new_weights: whether the policy changed.
            rows: data rows that the step used (None: `rows_per_step`).
        """
        self.steps_done += 1
        self.rows_read += self.rows_per_step if rows is None else rows
        self.weights_version += new_weights

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counters, the configuration, the timers and the description of the model."""
        checkpoint["consumed"], checkpoint["rows"] = self.steps_done, self.rows_read
        checkpoint["weights_version"] = self.weights_version
        if self.config is not None and self.tokenizer is not None:
            config = asdict(self.config)
            checkpoint["run"] = {
                "entry": self.entry,
                "config": config,
                "started_as": self.started_as or config,
                "tokenizer": self.tokenizer.fingerprint(),
                "extensions": fingerprints(named_extensions(self.config)),
            }
        checkpoint["scorers"] = self.scorer_fingerprints
        checkpoint["clock"] = self.clock.state_dict()
        if self.card is not None:
            checkpoint["model"] = self.card.plain()
        if self.frozen_checksums:
            checkpoint["frozen"] = self.frozen_checksums
            checkpoint["frozen_dtype"] = str(self.engines_dtype).removeprefix("torch.")

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters and timers. Refuse a checkpoint that this run cannot resume from, before weights are
        restored."""
        if "run" in checkpoint and self.tokenizer is not None:
            self._compare(checkpoint["run"], checkpoint.get("model") or {}, checkpoint["folder"])
        self._compare_frozen(checkpoint)
        self.steps_done = checkpoint["consumed"]
        self.rows_read = checkpoint.get("rows", self.steps_done * self.rows_per_step)
        self.weights_version = checkpoint.get("weights_version", self.steps_done)
        self.clock.load_state_dict(checkpoint["clock"])

    def _refuse_other_weights(self, role: Role, before: dict[str, int], dtype: torch.dtype, place: str) -> None:
        """Raise if the weights beside a role's adapters are not those whose checksums were taken in a dtype.

        In another precision than this run's, the checksums are of the stored model instead.
        """
        now = self.frozen_checksums[role.name]
        if dtype != self.engines_dtype:
            source = role.source
            if source is None:
                raise CheckpointError(
                    f"{place} was trained beside weights that the seed made in {str(dtype).removeprefix('torch.')}, "
                    f"and trainer.precision={self.config.trainer.precision} makes others: keep the precision",
                    key="trainer.precision",
                    value=self.config.trainer.precision,
                    where=place,
                )
            now = self.grid.run_on_rank0(lambda: {name: digest(source.read(name).to(dtype)) for name in sorted(now)})
        wrong = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
        if wrong:
            path = self.config.model.path
            given = f"seed={self.config.seed}" if path is None else f"model.path={path}"
            raise CheckpointError(
                f"{place} was trained beside other weights than {given} gives ({wrong[0]} and {len(wrong) - 1} more "
                "tensors differ): name the model that it was trained beside",
                key="model.path",
                value=path,
                where=place,
            )

    @property
    def engines_dtype(self) -> torch.dtype:
        """The dtype of the models' weights."""
        return torch.bfloat16 if self.config.trainer.precision == "bf16" else torch.float32

    def _compare_frozen(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint whose adapters were trained beside other weights than this run has."""
        dtype = getattr(torch, checkpoint.get("frozen_dtype", "float32"))
        for name, before in checkpoint.get("frozen", {}).items():
            if name in self.adapted_roles:
                place = f"the {name} in the checkpoint {checkpoint['folder']}"
                self._refuse_other_weights(self.adapted_roles[name], before, dtype, place)

    def _compare(self, saved: dict[str, Any], card: dict[str, Any], folder: str) -> None:
        """Log how this run's configuration differs from the checkpoint's, or refuse the checkpoint."""
        if saved["entry"] != self.entry:
            raise CheckpointError(
                f"the checkpoint {folder} was written by train_{saved['entry']}, and this is train_{self.entry}: pass "
                "it as model.path with run.resume=never, or choose another run.dir",
                key=f"train_{saved['entry']}",
                where=folder,
                offers={"run.resume": ["never"]},
            )
        self.started_as = saved["started_as"]
        same_tokenizer = saved["tokenizer"] == self.tokenizer.fingerprint()
        same_template = None
        if self.card is not None and "chat_template" in card:  # cards of older versions lack it
            same_template = card["chat_template"] == self.card.chat_template
        differences = resume.differences(
            saved["config"],
            saved["started_as"],
            asdict(self.config),
            tree=type(self.config),
            same_tokenizer=same_tokenizer,
            same_template=same_template,
        )
        resume.refuse(differences, folder)
        self.changed = {difference.key for difference in differences}
        if described := resume.told(differences):
            log.warning("the settings of this run differ from those in the checkpoint: %s", described)
        for key in changed(saved.get("extensions", {}), fingerprints(named_extensions(self.config))):
            log.warning("the code that %s names has changed since the checkpoint: it takes effect now", key)
