"""Export a model to a Hugging Face folder: one tensor at a time, into a sibling folder that is renamed at the end."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.disk import temp_sibling
from megarl.errors import CheckpointError, MegarlError, NumericsError
from megarl.logging import get_logger
from megarl.models.adapter_spec import ADAPTER
from megarl.models.adapters import changed_linears, present_weight, weight_of
from megarl.models.exchange.families import family_for
from megarl.models.exchange.family import Json, Mapped
from megarl.models.exchange.parameters import TRUNK
from megarl.models.exchange.source import (
    CONFIG,
    HEADS,
    MOMENTS,
    READS_EOS,
    REWARD_KIND,
    TOKEN_IDS,
    Source,
    pads_with_eos,
)
from megarl.models.exchange.stored import Stored, write_safetensors
from megarl.parallel.engine import Engine
from megarl.parallel.finite import is_finite
from megarl.parallel.grid import Grid
from megarl.parallel.initialise import is_sharded, join_slices, partition_dim
from megarl.parallel.shards import EXPERTS, run_on_all_ranks
from megarl.tokenizers import Tokenizer, build_tokenizer

SHARD_BYTES = 5_000_000_000
START_ID = "decoder_start_token_id"
"""Key of an encoder-decoder, with which transformers' generation starts."""
INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model", "special_tokens_map.json"),
    *(
        "added_tokens.json",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
        "chat_template.jinja",
        "chat_template.json",
        "megarl_tokenizer.json",
    ),
)
Fetch = Callable[[str], Tensor | None]
log = get_logger(__name__)


class PlannedFile(NamedTuple):
    """A file, the number of the ranks that write it (`places` in `export`), and the parameters that it contains."""

    name: str
    place: int
    parameters: list[str]


def export(
    engine: Engine,
    folder: Path,
    *,
    model: ModelConfig,
    vocab_size: int,
    family: str | None = None,
    tokenizer: Tokenizer | None = None,
    chat_template: str | None = None,
    score_moments: tuple[float, float] | None = None,
    reward_kind: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write an engine's model. All ranks call this together, and all raise if one of them fails.

    Each pipeline stage writes its own files through its first rank. Parameters beyond the language model go into a
    separate file, from which `model.path` reads them; the score head of a reward model, in the place of the output
    layer. Adapters are merged into the weights. Generation settings contain the stop tokens of `chat_template`
    (None: the tokenizer's own).
    """
    grid = engine.grid
    kind = family_for(model, family)
    scores = "score" in engine.models[0].heads
    mapping = kind.mapping(model, vocab_size, scores=scores)
    local: dict[str, Any] = {name: value for name, value in engine.parameters() if ADAPTER not in name}
    local |= {name: Merged(linear) for name, linear in changed_linears(engine.models)}
    here = {name: _whole_shape(parameter, grid.layout.tp) for name, parameter in local.items()}
    dtypes = {name: parameter.dtype for name, parameter in local.items()}
    found = grid.gather(((grid.pp_rank, grid.ep_rank), here, dtypes))
    places: dict[str, int] = {}  # numbers of the stages, and within a stage of the ranks that share its experts
    heads: dict[str, Stored] = {}
    for (stage, share), shapes, kinds in sorted(found, key=lambda item: item[0]):
        for name, shape in shapes.items():
            places.setdefault(name, stage * grid.layout.ep + (share if EXPERTS in name else 0))
            if name not in mapping and not name.startswith(TRUNK):
                heads[name] = Stored(shape, kinds[name])
    dtype = engine.config.params_dtype
    plan = plan_files(mapping, heads, places, dtype, shard_bytes)
    ids = token_ids(tokenizer) if tokenizer else {}
    config = kind.hf_config(model, vocab_size, scores=scores) | _describe(dtype, ids)
    if scores:
        config |= _of_reward_model(config, score_moments, reward_kind)
    aside = temp_sibling(folder)
    grid.run_on_rank0(lambda: prepare(folder, aside))
    with removed_on_error(aside, grid):
        run_on_all_ranks(grid, lambda: _write_place(plan, mapping, heads, local, dtype, aside, grid))
        grid.run_on_rank0(lambda: _finish(folder, aside, plan, mapping, config, tokenizer, chat_template))
    log.info("exported to %s as %s: %d tensors in %d files", folder, kind.name, len(mapping), len(plan))


@contextmanager
def removed_on_error(aside: Path, grid: Grid | None = None) -> Iterator[None]:
    """Remove an unfinished folder if the block fails; with a grid, on the first rank."""
    try:
        yield
    except Exception:
        if grid is None or grid.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def write_folder(
    source: Source,
    folder: Path,
    *,
    family: str | None = None,
    dtype: torch.dtype | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a stored model as a Hugging Face folder, in this process; `progress` is called with every tensor's name."""
    named = family or (source.family.name if source.family else None)
    kind = family_for(source.model, named)
    dtype = dtype or source.dtype
    scores = not source.has_output
    config = kind.hf_config(source.model, source.vocab_size, scores=scores) | _describe(dtype, source.token_ids)
    if scores:
        config |= _of_reward_model(config, source.score_moments, source.reward_kind, source.score_reads_eos)
    mapping = kind.mapping(source.model, source.vocab_size, scores=scores)
    heads = {name: stored for name, stored in source.heads.items() if name not in mapping}
    plan = plan_files(mapping, heads, {}, dtype, shard_bytes)

    def fetch(name: str) -> Tensor:
        progress(name)
        return source.read(name)

    with written_whole(folder) as aside:
        for file in plan:
            _write_file(aside, file, file.parameters, fetch, mapping, heads, dtype)
        tokenizer = keep_tokenizer(source, aside)
        _finish(folder, aside, plan, mapping, config, tokenizer, source.chat_template)


def keep_tokenizer(source: Source, aside: Path) -> Tokenizer | None:
    """Copy the source's tokenizer files and generation settings unchanged, or else build its tokenizer, save it and
    return it."""
    if source.tokenizer_files is not None:
        for name in (*TOKENIZER_FILES, "generation_config.json"):
            if (source.tokenizer_files / name).is_file():
                shutil.copyfile(source.tokenizer_files / name, aside / name)
    elif source.tokenizer is not None:
        tokenizer = build_tokenizer(*source.tokenizer)
        tokenizer.save(aside)
        return tokenizer
    return None


def plan_files(
    mapping: Mapping[str, Mapped],
    heads: Mapping[str, Stored],
    stages: Mapping[str, int],
    dtype: torch.dtype,
    shard_bytes: int,
) -> list[PlannedFile]:
    """Distribute every stage's parameters, in order, over files of at most `shard_bytes` (or one tensor)."""
    groups: list[tuple[int, list[str]]] = []
    size = 0
    for name, mapped in sorted(mapping.items(), key=lambda item: stages.get(item[0], 0)):
        stage, own = stages.get(name, 0), Stored(mapped.shape, dtype).bytes
        if not groups or groups[-1][0] != stage or size + own > shard_bytes:
            groups.append((stage, []))
            size = 0
        groups[-1][1].append(name)
        size += own
    count = len(groups)
    names = (
        ["model.safetensors"]
        if count == 1
        else [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    )
    plan = [PlannedFile(name, stage, group) for name, (stage, group) in zip(names, groups, strict=True)]
    if heads:
        by_stage = {stages.get(name, 0) for name in heads}
        assert len(by_stage) == 1, "heads are on the last stage"
        plan.append(PlannedFile(HEADS, by_stage.pop(), list(heads)))
    return plan


def token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the tokenizer's special ids by the names that config.json uses."""
    return dict(zip(TOKEN_IDS, (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id), strict=True))


@contextmanager
def written_whole(place: Path) -> Iterator[Path]:
    """Yield an empty folder beside `place`, and rename it to `place` when the block ends without an error."""
    aside = temp_sibling(place)
    prepare(place, aside)
    try:
        yield aside
    except OSError as problem:
        raise unwritten(place, problem) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def prepare(folder: Path, aside: Path) -> None:
    """Create an empty folder to write in; raise if the target exists."""
    refuse_existing(folder)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as problem:
        raise CheckpointError(
            f"cannot write in {folder.parent} ({problem.strerror}): name another folder", where=folder.parent
        ) from None


def unwritten(place: Path, problem: OSError) -> CheckpointError:
    """Return the error for a file or folder that could not be written."""
    said = problem.strerror or problem
    return CheckpointError(f"{place} could not be written ({said})", where=place)


def refuse_existing(folder: Path) -> None:
    """Raise if the target folder exists."""
    if folder.exists():
        raise CheckpointError(
            f"{folder} exists and is not overwritten: remove it, or name another folder", where=folder
        )


def _write_place(
    plan: Sequence[PlannedFile],
    mapping: Mapping[str, Mapped],
    heads: Mapping[str, Stored],
    local: Mapping[str, Any],
    dtype: torch.dtype,
    aside: Path,
    grid: Grid,
) -> None:
    """Write the files of this stage, and of the experts that this rank shares: tensor-parallel ranks send their slices
    to the first, which writes."""
    if grid.groups.expt_dp.rank() != 0:
        return
    problem: Exception | None = None
    for file in plan:
        if file.place != grid.pp_rank * grid.layout.ep + grid.ep_rank:
            continue
        names = iter(file.parameters)
        if problem is None and grid.tp_rank == 0:
            try:
                _write_file(aside, file, names, lambda name: gathered(local[name], grid), mapping, heads, dtype)
            except Exception as caught:  # the other ranks keep sending, so this one must keep receiving
                problem = caught
        for name in names:
            gathered(local[name], grid)
    if isinstance(problem, OSError):
        raise unwritten(aside, problem) from None
    if problem is not None:
        raise problem


class Merged:
    """The weight of a linear layer with its adapter, made when it is written: a slice like that of a parameter."""

    def __init__(self, linear: Any) -> None:
        self.linear = linear
        like = weight_of(linear)
        self.shape, self.dtype = like.shape, like.dtype
        for name in ("tensor_model_parallel", "partition_dim", "partition_stride"):
            setattr(self, name, getattr(like, name))

    def detach(self) -> Tensor:
        """Return this rank's slice of the merged weight, in the model's dtype."""
        linear = self.linear
        whole = present_weight(linear) if linear.adapter is None else linear.adapter.merged(linear)
        return whole.to(self.dtype)


def gathered(parameter: Any, grid: Grid) -> Tensor | None:
    """Return the whole parameter in host memory on the first tensor-parallel rank, and None on the others."""
    value: Tensor = parameter.detach()
    if not is_sharded(parameter) or grid.layout.tp == 1:
        return value.cpu() if grid.tp_rank == 0 else None
    group = grid.groups.tp
    parts = [torch.empty_like(value) for _ in range(grid.layout.tp)] if grid.tp_rank == 0 else None
    dist.gather(value.contiguous(), parts, dst=dist.get_process_group_ranks(group)[0], group=group)
    return None if parts is None else join_slices([part.cpu() for part in parts], parameter)


def _write_file(
    aside: Path,
    file: PlannedFile,
    names: Any,
    fetch: Fetch,
    mapping: Mapping[str, Mapped],
    heads: Mapping[str, Stored],
    dtype: torch.dtype,
) -> None:
    described = [item for name in file.parameters for item in _described(name, mapping, heads, dtype).items()]
    tensors = (piece for name in names for piece in _pieces(name, fetch(name), mapping, dtype))
    write_safetensors(aside / file.name, described, tensors, {"format": "pt"})


def _described(
    name: str, mapping: Mapping[str, Mapped], heads: Mapping[str, Stored], dtype: torch.dtype
) -> dict[str, Stored]:
    if name in heads:
        return {name: Stored(heads[name].shape, dtype)}
    return {theirs: Stored(shape, dtype) for theirs, shape in mapping[name].their_shapes().items()}


def _pieces(name: str, whole: Tensor | None, mapping: Mapping[str, Mapped], dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the tensors that the target format stores for one of our tensors."""
    assert whole is not None
    if name not in mapping:
        yield cast_checked(name, whole, dtype)
        return
    mapped = mapping[name]
    for piece in mapped.pieces(whole[: mapped.shape[0]]):  # without the padding rows of a vocabulary
        yield cast_checked(name, piece.view, dtype).reshape(piece.shape)


def cast_checked(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another dtype. Raise if that dtype cannot represent the values, or if any is not finite."""
    if not is_finite(tensor):
        raise NumericsError(
            f"{name} holds NaN or infinity: fetch the model again, or use an earlier checkpoint of its training",
            key=name,
        )
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    if not is_finite(result):
        largest = tensor.abs().max().item()
        raise CheckpointError(
            f"{name} has values up to {largest:g}, which {dtype} cannot hold: use bf16", key=name, value=largest
        )
    return result


def _finish(
    folder: Path,
    aside: Path,
    plan: Sequence[PlannedFile],
    mapping: Mapping[str, Mapped],
    config: Json,
    tokenizer: Tokenizer | None,
    chat_template: str | None,
) -> None:
    """Write index, configuration and tokenizer, and rename the folder to its final name."""
    weights = [file for file in plan if file.name != HEADS]
    if len(weights) > 1:
        where = {theirs: file.name for file in weights for name in file.parameters for theirs in mapping[name].theirs}
        total = sum((aside / file.name).stat().st_size for file in weights)
        _write_json(aside / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
    _write_json(aside / CONFIG, config)
    if not (aside / "generation_config.json").is_file():
        ids = {key: config[key] for key in (*TOKEN_IDS, START_ID) if config.get(key) is not None}
        stops = () if tokenizer is None else _stops(tokenizer, chat_template)
        if len(stops) > 1:  # transformers stops at each of several
            ids["eos_token_id"] = list(stops)
        _write_json(aside / "generation_config.json", {**ids, "_from_model_config": True})
    if tokenizer is not None:
        tokenizer.save(aside)
    refuse_existing(folder)
    aside.rename(folder)


def _stops(tokenizer: Tokenizer, chat_template: str | None) -> tuple[int, ...]:
    """Return the stop tokens of the model's training. An unreadable template was not used in training."""
    try:
        return tokenizer.stop_ids(chat_template)
    except MegarlError as problem:
        log.warning("the exported model stops at EOS alone, as its chat template cannot be read: %s", problem)
        return (tokenizer.eos_id,)


def _describe(dtype: torch.dtype, ids: Mapping[str, Any]) -> Json:
    return {"dtype": str(dtype).removeprefix("torch."), **ids}


def _of_reward_model(
    config: Json, score_moments: tuple[float, float] | None, reward_kind: str | None, reads_eos: bool = True
) -> Json:
    """Return the keys of config.json that only a reward model has.

    Transformers reads the score at the last token that is not padding. A score that is read at the EOS needs another
    token as padding, or none: transformers then scores one sequence at a time, at its last token.
    """
    found: Json = {READS_EOS: reads_eos, **dict(zip(MOMENTS, score_moments or (), strict=False))}
    if reward_kind is not None:
        found[REWARD_KIND] = reward_kind
    if reads_eos and pads_with_eos(config):
        found["pad_token_id"] = None
    return found


def _write_json(path: Path, values: Json) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _whole_shape(parameter: Any, tp: int) -> tuple[int, ...]:
    shape = list(parameter.shape)
    if is_sharded(parameter):
        shape[partition_dim(parameter)] *= tp
    return tuple(shape)
