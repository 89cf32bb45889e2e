"""One call from Python, `megarl.train(model, reward_fn=..., prompts=...)`, which runs the entry points themselves."""

from __future__ import annotations

import csv
import io
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from megarl.command import INTERRUPTED, NOTICED, process_number
from megarl.config.compose import compose
from megarl.config.files import load_chat_template
from megarl.config.leaf import or_defaults
from megarl.config.sections.extensions import ExtensionsConfig
from megarl.config.sections.parallel import ParallelConfig
from megarl.config.values import check_values
from megarl.disk import UnreadableError, parse_object, read_text, writable
from megarl.errors import ConfigError, DataError, UnavailableError, first_line
from megarl.inputs import Asked, Function, Inputs, asked_for, default_config, fill
from megarl.logging import get_logger, warn_once
from megarl.run.workers import started

if TYPE_CHECKING:
    from typing import Unpack  # from Python 3.11 on

DRAWN_BY = ("max_new_tokens", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "stop", "ilql_beta")
"""Keys of the `rollout` section that say how tokens are drawn."""

__all__ = ["Trained", "default_config", "train"]


class Trained:
    """What a run left behind: its checkpoint answers prompts and leaves for other libraries."""

    def __init__(
        self,
        config: Any,
        run_dir: Path,
        functions: Mapping[str, Function] | None = None,
        layout: ParallelConfig | None = None,
        evaluations: int = 0,
    ) -> None:
        """
        Args:
            config: configuration of the run.
            run_dir: its folder.
            functions: callables that the run used instead of the functions that `reward.fn` and `metric.fn` name.
            layout: parallel layout for generating and evaluating in the processes that have this object (None: one
                process).
            evaluations: number of evaluations that the folder has.
        """
        self.config, self.run_dir, self.functions = config, run_dir, dict(functions or {})
        self.layout, self._evaluations = layout or ParallelConfig(), evaluations

    @property
    def checkpoint(self) -> Path:
        """The newest one."""
        from megarl.checkpoint import find

        found = find(self.run_dir / "checkpoints")
        if not found:
            raise DataError(
                f"{self.run_dir} holds no checkpoint: set checkpoint.save_last=true, or checkpoint.every",
                where=self.run_dir,
                offers={"checkpoint.save_last": [True]},
            )
        return found[-1]

    @property
    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        path = self.run_dir / "summary.json"
        try:
            return parse_object(read_text(path))
        except UnreadableError as problem:
            raise DataError(f"{path} {problem}: the run has not ended, or the file was changed", where=path) from None

    @property
    def history(self) -> list[dict[str, float]]:
        """Logged metrics, a row per step that has any."""
        path = self.run_dir / "metrics.csv"
        try:
            rows = csv.DictReader(io.StringIO(read_text(path), newline=""))
            return [{name: float(value) for name, value in row.items() if value} for row in rows]
        except UnreadableError as problem:
            raise DataError(f"{path} {problem}: set logger.csv=true, or restore the file", where=path) from None
        except (ValueError, TypeError, csv.Error) as problem:
            raise DataError(
                f"{path} cannot be read ({problem}): set logger.csv=true, or restore the file", where=path
            ) from None

    def generate(self, prompts: str | Sequence[str], *, n: int = 1, **settings: Any) -> list[Any]:
        """Responses as text: one for each prompt, or with n above 1 a list of n for each.

        Of a prompt that leaves no room for its response, the end is read; with `too_long="error"` it is refused.

        Args:
            settings: of the `rollout` section, such as temperature, max_new_tokens or ilql_beta.
        """
        from megarl.data.formats import RecordFormat
        from megarl.data.prompts import PromptLimits, encode_prompt, fit_prompts
        from megarl.data.sources import Record
        from megarl.generate import open_generator
        from megarl.rollout.noise import EVALUATION
        from megarl.rollout.requests import repeat, sampling_from

        if settings.get("too_long") == "drop":
            raise ConfigError(
                "too_long='drop' would leave prompts without a response: use 'truncate' or 'error'",
                key="too_long",
                value="drop",
                offers={"too_long": ["truncate", "error"]},
            )
        asked = [prompts] if isinstance(prompts, str) else list(prompts)
        config = self.settings("generate", {"too_long": "truncate", **settings})
        with open_generator(config) as (generator, tokenizer, _):
            records = [Record({"prompt": text}, f"prompts[{index}]") for index, text in enumerate(asked)]
            limits = PromptLimits(
                generator.config.max_positions,
                config.rollout.max_new_tokens,
                generator.config.vocab_size,
                config.rollout.too_long,
            )
            encoded = (encode_prompt(record, tokenizer, RecordFormat(section="", settable=())) for record in records)
            tokens = [prompt.tokens for prompt in fit_prompts(encoded, limits, "prompts")]
            rollouts = generator.generate(repeat(tokens, n, sampling_from(config.rollout)), stream=EVALUATION)
            texts = [tokenizer.decode(rollout.response_without_eos) for rollout in rollouts]
        return texts if n == 1 else [texts[start : start + n] for start in range(0, len(texts), n)]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of the tables of samples that evaluations showed."""
        path = self.run_dir / "samples.jsonl"
        if not path.exists():
            return []
        try:
            return [parse_object(line) for line in read_text(path).splitlines() if line]
        except UnreadableError as problem:
            raise DataError(f"{path} {problem}: the file was changed", where=path) from None

    def evaluate(
        self,
        prompts: Sequence[str | Mapping[str, Any]],
        *,
        reward_fn: Function | str | None = None,
        metric_fn: Function | str | None = None,
        n: int = 1,
        **settings: Any,
    ) -> dict[str, Any]:
        """Evaluate responses to prompts, and return what `megarl evaluate` writes as evaluation.json. A folder of the
        run keeps it.

        Args:
            prompts: texts, or records with a "prompt" whose other fields go to the functions.
            reward_fn: what scores the responses (None: the run's reward).
            metric_fn: what measures them besides.
            n: number of responses to each prompt.
            settings: of the `rollout` section, such as temperature or max_new_tokens.
        """
        from megarl.evaluate import evaluate_here
        from megarl.inputs import named_functions, write_records

        reward = getattr(self.config, "reward", None)
        config = self.settings("evaluate", settings)
        config.seed, config.eval.n = self.config.seed, n
        if reward_fn is None and reward is not None:
            config.reward, reward_fn = reward, self.functions.get("reward.fn")
        functions = named_functions(config, "evaluate", reward_fn, metric_fn)
        self._evaluations += 1
        folder = self.run_dir / "evaluations" / str(self._evaluations)
        config.run.dir = str(folder)
        config.data.eval = [write_records(folder / "prompts.jsonl", prompts, config.parallel.timeout_s)]
        check_values(config)
        return evaluate_here(config, functions)

    def settings(self, program: str, rollout: Mapping[str, Any]) -> Any:
        """Return the configuration of a program that generates with the trained model: drawn as in the run, but for
        `rollout`, in the layout of this object.

        Args:
            program: generate or evaluate.
            rollout: keys of the section `rollout`.
        """
        own = getattr(self.config, "rollout", None)
        drawn = {key: getattr(own, key) for key in DRAWN_BY if getattr(own, key, None) is not None}
        config, _ = compose(program, [])
        config.model.path = str(self.checkpoint)
        config.extensions = ExtensionsConfig(families=or_defaults(self.config, "extensions").families)
        fill(config.rollout, {**drawn, **rollout}, "rollout")
        config.parallel.tp, config.parallel.pp = self.layout.tp, self.layout.pp
        if program == "generate":
            config.trainer.progress = "none"
            config.chat_template = load_chat_template(self.config.data.chat_template)  # its end marker ends responses
        else:
            config.data.chat_template = self.config.data.chat_template
            config.trainer.precision = self.config.trainer.precision
        check_values(config)
        return config

    def push_to_hub(
        self,
        repo_id: str,
        *,
        adapter: bool = False,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload model",
    ) -> str:
        """Upload what `save_pretrained` writes to the Hugging Face hub, and return the address of the commit.

        Args:
            repo_id: name of the repository, such as org/model; it is created if it does not exist.
            adapter: upload the adapter alone.
            private: whether a new repository is private (None: the account's default).
            token: token of the account (None: the one that `hf auth login` stored, or HF_TOKEN).
            commit_message: the message.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        with tempfile.TemporaryDirectory() as above:
            folder = Path(above) / "model"
            self.save_pretrained(folder, adapter=adapter)
            if process_number() != 0:
                return ""
            api = HfApi(token=token)
            try:
                made = api.create_repo(repo_id, private=private, exist_ok=True)
                found = api.upload_folder(repo_id=made.repo_id, folder_path=folder, commit_message=commit_message)
            except (HfHubHTTPError, HFValidationError, OSError) as problem:
                said = first_line(problem).rstrip(".")
                raise UnavailableError(
                    f"push_to_hub(repo_id='{repo_id}') failed ({said}): check the name, the network and the token (hf "
                    "auth login, or HF_TOKEN)",
                    key="repo_id",
                    value=repo_id,
                    where=repo_id,
                ) from None
        return str(found.commit_url)

    def save_pretrained(self, folder: str | Path, *, adapter: bool = False) -> None:
        """Write the model as a new folder that transformers loads, with its adapter merged.

        Args:
            folder: the folder, which must not exist yet.
            adapter: write the adapter alone instead, as a folder that PEFT loads.
        """
        if adapter and getattr(self.config, "adapter", None) is None:
            raise ConfigError(
                "save_pretrained(adapter=True) writes an adapter, and this run has none: set adapter.rank before "
                "training, or leave adapter=True out",
                key="adapter",
                value=True,
            )
        if process_number() != 0:
            return
        target = writable(str(folder), "save_pretrained")
        from megarl.models.exchange.formats import write_pretrained

        write_pretrained(self.checkpoint, target, adapter=adapter)


def train(
    model: str | Path | Mapping[str, Any] | None = None,
    *,
    config: DictConfig | None = None,
    processes: int | None = None,
    **inputs: Unpack[Inputs],
) -> Trained:
    """Train by PPO (a reward function), ILQL (samples with rewards), SFT (samples alone) or DPO (pairs).

    Runs in a script, a notebook, or every process that torchrun started. A notice or Ctrl-C saves the run and ends the
    script; the same call with the same run.dir goes on.

    Args:
        model: a folder or hub name, or keys of the `model` section to start from random weights.
        config: from `default_config`; it says which algorithm unless the inputs do.
        processes: number of processes to start for the run, also from a notebook (None: this one, or those of
            torchrun, SLURM or trainer.devices).
        inputs: reward_fn, prompts, eval_prompts, samples, rewards, pairs, eval_pairs, metric_fn, stop_sequences and
            device, as `megarl.inputs.Inputs` describes them.
    """
    asked = asked_for(model, config, inputs)
    earlier = len(list(asked.run_dir.glob("evaluations/*")))  # before anything that another process could write
    if asked.config.model.path is None and asked.config.exports.hf is None:
        _warn_of_no_family(asked.config)
    if processes is None:
        code = _run({}, asked)
    else:
        with started(processes, asked.config) as workers:
            code = workers.call(_run, asked)
    # The run is saved, but what follows the call is for a trained model.
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if code == NOTICED:
        raise SystemExit(0)
    layout = asked.config.parallel if processes is None else ParallelConfig()
    return Trained(asked.config, asked.run_dir, asked.functions, layout, earlier)


def _run(_: dict[str, Any], asked: Asked) -> int:
    """Run the entry point, in every process of the run. Return the exit code."""
    from megarl import training

    with asked.written():
        return training.train(asked.entry, asked.config, asked.functions)


def _warn_of_no_family(config: Any) -> None:
    """Before training, as `save_pretrained` would refuse after it."""
    from megarl.models.exchange.families import add_families, require_family

    add_families(or_defaults(config, "extensions").families)
    try:
        require_family(config.model, None, "save_pretrained will not work")
    except ConfigError as problem:
        warn_once(get_logger(__name__), str(problem))
