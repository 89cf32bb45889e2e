"""`python -m megarl.evaluate model.path=... data.eval=[...] reward.fn=...`: measures of a model, as JSON."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import megarl
from megarl.command import process_number
from megarl.config.compose import run
from megarl.config.world import local_devices
from megarl.disk import exists, local, require_new, write_atomically
from megarl.errors import ConfigError, DataError
from megarl.progress import waiting_for_imports

if TYPE_CHECKING:
    from megarl.config.evaluate import EvaluateConfig
    from megarl.data.prompts import Prompt
    from megarl.experience.held_out import HeldOut
    from megarl.experience.results import Results
    from megarl.models.exchange.pretrained import Sources
    from megarl.parallel.engine import Engine
    from megarl.parallel.grid import Grid
    from megarl.rollout.requests import Rollout
    from megarl.run.run_folder import RunFolder
    from megarl.tokenizers import Tokenizer

OUT = "evaluation.json"
Functions = Mapping[str, Callable[..., Any]]


def evaluate(config: "EvaluateConfig") -> int:
    """Evaluate in the processes that a launcher started, else in `trainer.devices` new ones. Return the exit code."""
    with waiting_for_imports():
        from megarl.parallel.processes import run_in_processes, set_env_from_slurm
        from megarl.run.run_folder import resolve_run_dir

    set_env_from_slurm()
    config.run.dir = str(resolve_run_dir("evaluate", config).absolute())
    devices = 1 if "WORLD_SIZE" in os.environ else local_devices(config)
    if devices == 1:
        work(config)
        return 0
    return run_in_processes(devices, work, config)


def work(config: "EvaluateConfig") -> None:
    """Evaluate in this process of the world, and write the files."""
    evaluate_here(config)


def evaluate_here(config: "EvaluateConfig", functions: Functions | None = None) -> dict[str, Any]:
    """Evaluate in this process of the world, write the files, and return the result, the same on every rank.

    Args:
        config: typed configuration tree.
        functions: callables to use instead of the functions that `reward.fn` and `metric.fn` name.
    """
    from megarl.logging import setup
    from megarl.run.owner import owned
    from megarl.run.run_folder import RunFolder

    assert config.run.dir is not None
    run_dir = Path(config.run.dir)
    _refuse_training_run(run_dir)
    folder = RunFolder(run_dir)
    with owned(run_dir, config.parallel.timeout_s):
        setup(run_dir, rank=process_number(), debug=config.debug)
        # A process may have written them since the configuration was checked.
        for key, value in config.more_folders().items():
            require_new(value, key)
        if process_number() == 0:
            folder.write_config(asdict(config))
            folder.write_environment()
        result, samples, shown = _evaluated(config, run_dir, functions)
        if process_number() == 0:
            _write(config, folder, result, samples)
            _print(result, shown)
            _print_files(config, run_dir)
    return result


def _refuse_training_run(run_dir: Path) -> None:
    """Refuse the folder of a training run, whose config.yaml would be replaced."""
    from megarl.experience.results import FOLDER

    found = [name for name in ("checkpoints", "metrics.csv") if exists(run_dir / name)]
    if found and not exists(run_dir / FOLDER):
        raise ConfigError(
            f"run.dir={run_dir} is the folder of a training run, as it has {found[0]}: name another folder for the "
            "evaluation",
            key="run.dir",
            value=str(run_dir),
            where=run_dir / found[0],
        )


def _evaluated(
    config: "EvaluateConfig", run_dir: Path, functions: Functions | None
) -> tuple[dict[str, Any], list[dict[str, Any]], list[dict[str, Any]]]:
    """Build the models and evaluate. Return the result, a record for each response if `samples` wants them, and the
    rows of the table to show."""
    from megarl.data.agreement import refuse_different_data
    from megarl.data.prompts import PromptLimits, read_prompts
    from megarl.experience.build_scorers import check_fields_of_functions, reward_roles
    from megarl.experience.held_out import deciding_settings, result_of, stored_settings
    from megarl.models.build import build_engine, vocabulary
    from megarl.models.exchange.pretrained import resolve_pretrained
    from megarl.models.roles import Role
    from megarl.parallel.digest import weights_digest
    from megarl.parallel.grid import grid_of_world
    from megarl.rollout.guided import policy_heads
    from megarl.tokenizers import tokenizer_of

    config, sources = resolve_pretrained(config)
    source = sources.at(config.model.path)
    heads = policy_heads(source)
    _check_sweep(config, heads)
    _warn_without_effect(config, heads)
    tokenizer = tokenizer_of(config)
    vocab_size = vocabulary(config.model, tokenizer)
    data, rollout = config.data, config.rollout
    limits = PromptLimits(config.model.max_positions, rollout.max_new_tokens, vocab_size, rollout.too_long)
    prompts = read_prompts(data.eval, data.eval_split, data, tokenizer, limits, "data.eval")
    check_fields_of_functions(prompts, config)
    roles = [Role("policy", config.model, vocab_size, heads, source=source), *reward_roles(config, sources)]
    with grid_of_world(config) as grid:
        texts = [prompt.text for prompt in prompts]
        refuse_different_data(grid, (prompt.tokens for prompt in prompts), "data.eval", kept=texts)
        engines = {
            role.name: build_engine(role, grid, config.parallel, precision=config.trainer.precision, seed=config.seed)
            for role in roles
        }
        weights = weights_digest(engines["policy"])
        decides = {
            "model.path": weights,
            "tokenizer.path": tokenizer.fingerprint(),
            "data.eval": _digest(prompts),
            "data.chat_template": list(tokenizer.stop_ids(_template(config))),
            **deciding_settings(config),
        }
        results = _opened(grid, run_dir, decides)
        with closing(
            _held_out(config, prompts, tokenizer, grid, engines, sources, heads, results, run_dir, functions)
        ) as held_out:
            measured = held_out.run()
            samples = [line for one in measured for line in held_out.lines(one)] if config.samples else []
            shown = [row for one in measured for row in held_out.table(one)]
            by = {name: scorer.fingerprint for name, scorer in held_out.scorers.items()}
    result = {
        **result_of(measured, prompts),
        "model": {"path": config.model.path, "weights": weights},
        "seed": config.seed,
        "precision": config.trainer.precision,
        "scored_by": by,
        "settings": stored_settings(config),
        "megarl": megarl.__version__,
    }
    return result, samples, shown


def _held_out(
    config: "EvaluateConfig",
    prompts: "list[Prompt]",
    tokenizer: "Tokenizer",
    grid: "Grid",
    engines: "dict[str, Engine]",
    sources: "Sources",
    heads: Sequence[str],
    results: "Results | None",
    run_dir: Path,
    functions: Functions | None,
) -> "HeldOut":
    """Return the evaluation, with its generator and its scorers."""
    from megarl.experience.build_scorers import ScorerBuilder, by_metric_name
    from megarl.experience.evaluation import answer_reader
    from megarl.experience.held_out import HeldOut
    from megarl.experience.sources import GeneratedRollouts
    from megarl.parallel.offload import alone
    from megarl.rollout.guided import scorer_for

    def on_device(engine: "Engine") -> AbstractContextManager[None]:
        """Return a context in which, with parallel.offload, only this engine's weights are on the device."""
        return alone(engine, engines.values()) if config.parallel.offload else nullcontext()

    source = GeneratedRollouts(
        engines["policy"],
        tokenizer,
        config.rollout,
        seed=config.seed,
        chat_template=_template(config),
        unit="step",
    )
    source.publish(0)
    source.check_prompts(prompts)

    def respond(chunk: range, stream: int, changes: Mapping[str, float]) -> "list[Rollout]":
        sampling = dict(changes)
        scorer = scorer_for(heads, sampling.pop("beta", config.rollout.ilql_beta))
        with on_device(engines["policy"]):
            return source.collect(
                prompts, config.eval.n, stream=stream, phase=0, token_scorer=scorer, within=chunk, **sampling
            )

    scorers = ScorerBuilder(
        config,
        tokenizer,
        grid,
        engines,
        sources,
        run_dir,
        alone=on_device,
        functions=functions,
        micro_batch_size=config.trainer.micro_batch_size,
    ).scorers()
    sources.close()
    return HeldOut(
        respond,
        prompts,
        by_metric_name(scorers),
        config.eval,
        tokenizer,
        grid,
        results,
        chunk=config.chunk,
        drops=config.reward.call_settings.on_error == "drop",
        read_answers=answer_reader(config.eval, grid),
    )


def _opened(grid: "Grid", run_dir: Path, decides: Mapping[str, Any]) -> "Results | None":
    """Return the stored results on rank 0, None on others. All refuse a folder with another evaluation's."""
    from megarl.experience.results import Results

    found: Results | None = None

    def on_rank0() -> None:
        nonlocal found
        found = Results(run_dir, decides)

    grid.run_on_rank0(on_rank0)
    return found


def _check_sweep(config: "EvaluateConfig", heads: Sequence[str]) -> None:
    """Refuse a sweep of beta for a model without Q heads."""
    values = config.eval.sweep.beta
    if values and "q" not in heads:
        raise ConfigError(
            f"eval.sweep.beta={values} is for models trained with ILQL, and model.path={config.model.path} has no Q "
            "heads: leave it empty",
            key="eval.sweep.beta",
            value=values,
            offers={"eval.sweep.beta": [[]]},
        )


def _warn_without_effect(config: "EvaluateConfig", heads: Sequence[str]) -> None:
    """Warn of keys that are set and have no effect in an evaluation of this model."""
    from megarl.logging import get_logger

    log, beta, recompute = get_logger(__name__), config.rollout.ilql_beta, config.parallel.recompute
    if recompute != "none":
        log.warning("parallel.recompute=%s has no effect, because an evaluation has no backward pass", recompute)
    if "q" not in heads and beta != type(config.rollout)().ilql_beta:
        log.warning("rollout.ilql_beta=%g has no effect, because model.path=%s has no Q heads", beta, config.model.path)


def _template(config: "EvaluateConfig") -> str | None:
    from megarl.config.files import load_chat_template

    return load_chat_template(config.data.chat_template)


def _digest(prompts: "Sequence[Prompt]") -> str:
    """Return a digest of the prompts: their texts, tokens and other fields."""
    import hashlib

    content = json.dumps([[prompt.text, prompt.tokens, prompt.metadata] for prompt in prompts], default=repr)
    return hashlib.sha256(content.encode()).hexdigest()


def _write(
    config: "EvaluateConfig", folder: "RunFolder", result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Write the samples, and then the result. If one cannot be written, neither is there, so that the evaluation can be
    started again."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    samples_file = None if config.samples is None else local(config.samples)
    key, path = "samples", samples_file
    try:
        if samples_file is not None:
            samples_file.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(samples_file, (json.dumps(sample, allow_nan=False) + "\n" for sample in samples))
        key, path = "out", folder.path / OUT if config.out is None else local(config.out)
        if config.out is None:
            folder.write(OUT, text)  # an earlier result, as of another reward, is set aside
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
    except OSError as problem:
        if key == "out" and samples_file is not None:
            samples_file.unlink(missing_ok=True)
        raise DataError(
            f"{key}={path} cannot be written ({problem.strerror}): free space, and start again with "
            f"run.dir={folder.path}",
            key=key,
            value=str(path),
            where=path,
        ) from None


def _print(result: Mapping[str, Any], shown: list[dict[str, Any]]) -> None:
    """Print some responses and the metrics."""
    from megarl.callbacks.samples import as_table

    if shown:
        sys.stdout.write(as_table(shown) + "\n")
    for name, value in result["metrics"].items():
        sys.stdout.write(f"{name} {value:.6g}\n")
    sys.stdout.write(f"{result['responses']} responses to {result['prompts']} prompts\n")


def _print_files(config: "EvaluateConfig", run_dir: Path) -> None:
    """Print where the result and the samples are."""
    sys.stdout.write(f"result: {run_dir / OUT if config.out is None else local(config.out)}\n")
    if config.samples is not None:
        sys.stdout.write(f"samples: {local(config.samples)}\n")


def main() -> None:
    """Run the command."""
    run("evaluate", sys.argv[1:], evaluate)


if __name__ == "__main__":
    main()
