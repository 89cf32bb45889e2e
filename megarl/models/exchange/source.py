"""Stored models in any format: their shape, and their whole tensors in our layout, one at a time."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from megarl.checkpoint import MANIFEST, plain_content
from megarl.config.leaf import leaves, section, sections
from megarl.config.renames import renamed_tree
from megarl.config.resume import from_plain
from megarl.config.sections.model import ModelConfig
from megarl.config.values import LARGEST, SMALLEST
from megarl.disk import UnreadableError, is_file, parse_object, read_json, read_text, shown
from megarl.errors import CheckpointError
from megarl.models.exchange.families import FAMILIES, family_of
from megarl.models.exchange.family import Family, Json, checked
from megarl.models.exchange.parameters import SCORE, TRUNK, VOCABULARY, parameters
from megarl.models.exchange.stored import Folder, SafetensorsFile, Stored
from megarl.models.exchange.views import same
from megarl.parallel import shards
from megarl.parallel.shards import Part
from megarl.tokenizers import KINDS, read_marker

CONFIG = "config.json"
HEADS = "megarl_heads.safetensors"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
MOMENTS = ("score_mean", "score_std")  # keys of a reward model's config.json, which transformers ignores
READS_EOS, REWARD_KIND = "score_reads_eos", "reward_kind"  # others


@dataclass
class _Described:
    """The section of a configuration that a card contains."""

    model: ModelConfig = section(ModelConfig)  # noqa: RUF009 - it returns a dataclass field


class Source(ABC):
    """A stored model. Opening it finds every error that can be found without reading its weights.

    Attributes:
        model: the shape, with `path` unset.
        family: the Hugging Face family, if it is known.
        dtype: dtype of the weights.
        tokenizer: kind and path of its tokenizer, or None.
        token_ids: the special ids in config.json.
        chat_template: the template that it was trained with, if that is not the tokenizer's own.
        left_out: stored tensors that are not read, with the reason.
        heads: tensors beyond the language model, by name.
        has_output: whether it has an output layer; a reward model has a score head instead.
        score_moments: mean and standard deviation of a reward model's scores on its reference set; None if unknown.
        score_reads_eos: whether the score of a reward model is read at the EOS, and not before it.
        reward_kind: what a reward model was trained on: ranking, regression or steps; None if unknown.
        stored: number of stored tensors and bytes, including heads.
        tokenizer_files: the folder whose tokenizer files are copied unchanged with the model; None: there is none.
    """

    kind: ClassVar[str]
    path: Path
    model: ModelConfig
    vocab_size: int
    family: Family | None
    dtype: torch.dtype
    tokenizer: tuple[str, str | None] | None
    token_ids: dict[str, Any]
    chat_template: str | None = None
    left_out: dict[str, str]
    heads: dict[str, Stored]
    has_output: bool = True
    score_moments: tuple[float, float] | None = None
    score_reads_eos: bool = True
    reward_kind: str | None = None
    stored: tuple[int, int]
    tokenizer_files: Path | None = None

    @property
    def checkpoints(self) -> list[Path]:
        """The megarl checkpoints that it is read from, whose checksums can be compared."""
        return [self.path] if self.kind == "megarl" else []

    @property
    def names(self) -> set[str]:
        """Our names of all tensors that it contains."""
        return set(parameters(self.model, self.vocab_size, output=self.has_output)) | set(self.heads)

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """Return a whole tensor by our name, in its stored dtype; vocabularies without padding rows."""

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor, or fewer if it has fewer."""
        return self.read(name)[first:last]


def family_name(source: Source | None) -> str | None:
    """Return the name of the family in which a stored model was published; None if there is none."""
    return source.family.name if source is not None and source.family is not None else None


class HuggingFaceSource(Source):
    """A folder written by `save_pretrained`."""

    kind = "huggingface"

    def __init__(self, path: Path) -> None:
        self.path = self.tokenizer_files = path
        config = read_config(path)
        if "quantization_config" in config:
            raise CheckpointError(
                f"{path / CONFIG} has a quantization_config: use the model in bf16, fp16 or fp32",
                key="quantization_config",
                value=config["quantization_config"],
                where=path / CONFIG,
            )
        self.family = family_of(config)
        self.model = self.family.model_config(config)
        assert self.model.vocab_size is not None
        self.vocab_size = self.model.vocab_size
        self.token_ids = {key: config[key] for key in TOKEN_IDS if key in config}
        self.tokenizer = tokenizer_of(path)
        self.has_output = self.family.classifier not in (config.get("architectures") or [])
        self._heads = SafetensorsFile(path / HEADS) if is_file(path / HEADS) else None
        self.heads = dict(self._heads.tensors) if self._heads else {}
        if not self.has_output and self.family.trunk is not None and SCORE not in self.heads:
            raise CheckpointError(
                f"{path} has architectures={self.family.trunk}, whose output is states: use a folder with an output "
                f"layer ({self.family.architectures[0]}), or one of a reward model, with {HEADS}",
                key="architectures",
                value=self.family.trunk,
                where=path,
            )
        if not self.has_output:
            self.score_moments = _read_moments(config, path)
            self.score_reads_eos = _read_reads_eos(config, path)
            self.reward_kind = _text(config.get(REWARD_KIND))
        self._folder = Folder(path)
        encoder = self.model.encoder
        if encoder is not None and not encoder.scale_outputs and "lm_head.weight" in self._folder.tensors:
            # Transformers 5 writes in either case that it is tied.
            self.model = replace(self.model, tie_embeddings=False)
        self.mapping = self.family.mapping(self.model, self.vocab_size, scores=not self.has_output)
        self._where, self.left_out = self._check_tensors()
        if SCORE in self.mapping:
            self.heads[SCORE] = self._folder.tensors[self._where["score.weight"]]
        for name, stored in self.heads.items():
            if not isinstance(stored.dtype, torch.dtype):
                raise unfit_dtype(path / HEADS, name, stored.dtype)
        all_stored = [*self._folder.tensors.values(), *self.heads.values()]
        self.stored = (len(all_stored), sum(item.bytes for item in all_stored))

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by our name, joined from the stored tensors."""
        if self._heads is not None and name in self._heads.tensors:
            return self._heads.read(name)
        mapped = self.mapping[name]
        theirs = [self._where[stored] for stored in mapped.theirs]
        if mapped.views is same:
            return self._folder.read(theirs[0])
        first = self._folder.tensors[theirs[0]].dtype
        assert isinstance(first, torch.dtype)
        whole = torch.empty(mapped.shape, dtype=first)
        for stored, piece in zip(theirs, mapped.pieces(whole), strict=True):
            piece.view.copy_(self._folder.read(stored).reshape(piece.view.shape))
        return whole

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1; only these are read if the tensor is stored as we have it."""
        mapped = self.mapping.get(name)
        if mapped is None or mapped.views is not same:
            return super().rows(name, first, last)
        return self._folder.rows(self._where[mapped.theirs[0]], first, last)

    def _check_tensors(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return stored names by canonical name, and the tensors that are not read. Raise for tensors that are missing,
        unknown, misshapen or not weights."""
        assert self.family is not None
        wanted = {name: shape for mapped in self.mapping.values() for name, shape in mapped.their_shapes().items()}
        where: dict[str, str] = {}
        left_out: dict[str, str] = {}
        for stored in self._folder.tensors:
            name = self.family.canonical(stored, wanted)
            if name in wanted:
                where[name] = stored
            elif reason := self._reason_to_leave_out(name):
                left_out[stored] = reason
            else:
                raise CheckpointError(
                    f"{self.path} has a tensor {stored} that a {self.family.name} of this config.json does not: "
                    "they do not belong together",
                    key=stored,
                    where=self.path,
                )
        missing = [name for name in wanted if name not in where]
        if missing:
            raise CheckpointError(
                f"{self.path} lacks {missing[0]} ({len(missing)} tensors in all), which a {self.family.name} of this "
                "config.json has: fetch it again",
                key=missing[0],
                where=self.path,
            )
        dtypes = []
        for name, stored in where.items():
            shape, dtype = self._folder.tensors[stored]
            if shape != wanted[name]:
                raise CheckpointError(
                    f"{self.path}: {stored} has shape {list(shape)} but config.json requires {list(wanted[name])}",
                    key=stored,
                    value=list(shape),
                    where=self.path,
                )
            if not isinstance(dtype, torch.dtype):
                raise unfit_dtype(self.path, stored, dtype)
            dtypes.append(dtype)
        self.dtype = widest_dtype(dtypes)
        return where, left_out

    def _reason_to_leave_out(self, name: str) -> str | None:
        assert self.family is not None
        if self.family.renamed.get(name, name) in ("lm_head.weight", "lm_head.bias", "embed_out.weight"):
            if not self.has_output:
                return "an output layer, which a reward model does not need"
            if self.model.tie_embeddings and not name.endswith(".bias"):
                return "tied to the embedding, which is read instead"
        return self.family.reason_to_ignore(name)


class CheckpointSource(Source):
    """The weights of one engine in a megarl checkpoint."""

    kind = "megarl"

    def __init__(self, path: Path, engine: str = "policy") -> None:
        _check_sizes(path)
        self.path, self.engine = path, engine
        common, parts = plain_content(path)
        self._read_card(common.get("model"))
        self._sort(parts)

    def _read_card(self, card: Any) -> None:
        """Read the model card. Keys missing from older versions get their defaults; unknown keys are rejected."""
        where = f"the card of checkpoint {self.path}"
        if card is None or card == {}:
            raise CheckpointError(
                f"checkpoint {self.path} does not describe its model: it is from an older version",
                key="model",
                where=self.path,
            )
        if not isinstance(card, dict) or not isinstance(card.get("config"), dict):
            raise CheckpointError(
                f"{where} describes no model: it is damaged, choose another",
                key="model",
                value=card,
                where=where,
            )
        self.model = checked(self._described(card["config"], where), where)
        size, family, tokenizer = card.get("vocab_size"), card.get("family"), card.get("tokenizer")
        if type(size) is not int or not 0 < size < 2**31:
            raise CheckpointError(
                f"{where} has vocab_size={shown(size)}: it is damaged, choose another",
                key="vocab_size",
                value=size,
                where=where,
            )
        self.vocab_size = size
        self.family = FAMILIES.get(family) if isinstance(family, str) else None
        self.tokenizer = None if tokenizer is None else _tokenizer_in(tokenizer, where)
        token_ids = card.get("token_ids") or {}
        self.token_ids = dict(token_ids) if isinstance(token_ids, dict) else {}
        moments = card.get("score_moments")
        self.score_moments = None if moments is None else checked_moments(moments, where)
        self.score_reads_eos = card.get("score_reads_eos") is not False
        self.reward_kind = _text(card.get("reward_kind"))
        self.chat_template = _text(card.get("chat_template"))

    def _described(self, config: Json, where: str) -> ModelConfig:
        """Return the model of a card, whose keys may have the names of an earlier version."""
        plain = renamed_tree({"model": {**config, "path": None}}, _Described, warn=False)["model"]
        known = {leaf.key for leaf in leaves(ModelConfig)}
        flat = dict(plain)
        for name in sections(ModelConfig):
            keys = flat.pop(name, None)
            if not (keys is None or isinstance(keys, dict)):
                raise CheckpointError(
                    f"{where} has model.{name}={shown(keys)}, which is not a section: it is damaged, choose another",
                    key=f"model.{name}",
                    value=keys,
                    where=where,
                )
            flat |= {f"{name}.{key}": value for key, value in (keys or {}).items()}
        later = next((key for key in flat if key not in known), None)
        if later is not None:
            raise CheckpointError(
                f"checkpoint {self.path} was written by a later version of megarl: its model has "
                f"model.{shown(later)}, which this version does not know; update megarl",
                key=f"model.{shown(later)}",
                value=flat[later],
                where=self.path,
            )
        described: _Described = from_plain(_Described, {"model": plain})
        return described.model

    def _sort(self, parts: Sequence[Part]) -> None:
        self.has_output = all(part.key != f"{self.engine}.{SCORE}" for part in parts)
        self._shapes = parameters(self.model, self.vocab_size, output=self.has_output)
        self._parts: dict[str, list[Part]] = {}
        others = 0
        for part in parts:
            name = part.key.removeprefix(f"{self.engine}.")
            if name == part.key or name.startswith(("optimizer.", "optimizer_")):
                others += 1
            else:
                self._parts.setdefault(name, []).append(part)
        missing = [name for name in self._shapes if name not in self._parts]
        if missing:
            name = f"{self.engine}.{missing[0]}"
            raise CheckpointError(f"checkpoint {self.path} lacks {name}", key=name, where=self.path)
        for name, shape in self._shapes.items():
            first, *rest = self._parts[name][0].tensor_shape
            padded = name in VOCABULARY and first > shape[0]
            if not (first == shape[0] or padded) or tuple(rest) != shape[1:]:
                raise CheckpointError(
                    f"checkpoint {self.path} has {name} of shape {[first, *rest]}, but its card requires {list(shape)}",
                    key=name,
                    value=[first, *rest],
                    where=self.path,
                )
        described = {
            name: Stored(parts[0].tensor_shape, getattr(torch, parts[0].dtype)) for name, parts in self._parts.items()
        }
        self.heads = {name: stored for name, stored in described.items() if not name.startswith(TRUNK)}
        self.left_out = {"optimizer state": f"{others} parts; only weights are read"} if others else {}
        self.dtype = widest_dtype([described[name].dtype for name in self._shapes])  # target heads are kept in float32
        self.stored = (len(described), sum(stored.bytes for stored in described.values()))

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by our name, joined from its parts; vocabularies without padding rows."""
        parts = self._parts[name]
        whole = shards.read_whole(parts, self.path)[parts[0].key]
        return whole[: self._shapes[name][0]] if name in self._shapes else whole  # a vocabulary has padding rows


def _text(value: Any) -> str | None:
    """Return a value that is a text, and None for every other."""
    return value if isinstance(value, str) else None


def _read_moments(config: Json, path: Path) -> tuple[float, float] | None:
    """Return the mean and the standard deviation of a reward model's scores from its config.json; refuse a model with
    several scores."""
    labels = config.get("id2label")
    count = len(labels) if isinstance(labels, dict) else config.get("num_labels", 2)  # transformers' default
    if count != 1:
        raise CheckpointError(
            f"{path} gives {shown(count)} scores to a sequence, and a reward model gives one: name a model with one "
            "label (id2label in config.json)",
            key="id2label",
            value=labels,
            where=path,
        )
    mean, std = (config.get(key) for key in MOMENTS)
    return None if mean is None and std is None else _moments(mean, std, path / CONFIG)


def checked_moments(moments: Any, where: Path | str) -> tuple[float, float]:
    """Return the mean and the standard deviation of a model card; refuse other values."""
    mean, std = moments if isinstance(moments, list | tuple) and len(moments) == 2 else (moments, None)
    return _moments(mean, std, where)


def _moments(mean: Any, std: Any, where: Path | str) -> tuple[float, float]:
    """Return a mean and a standard deviation; refuse values that are none."""
    numbers = [value for value in (mean, std) if isinstance(value, int | float) and not isinstance(value, bool)]
    if len(numbers) < 2 or not (abs(mean) <= LARGEST and SMALLEST <= std <= LARGEST):
        raise CheckpointError(
            f"{where} has {MOMENTS[0]}={shown(repr(mean))} and {MOMENTS[1]}={shown(repr(std))}, which are no mean and "
            "standard deviation: restore them",
            key=MOMENTS[0],
            value=mean,
            where=where,
        )
    return float(mean), float(std)


def pads_with_eos(config: Json) -> bool:
    """Return whether the padding token in a config.json is the EOS, or one of several."""
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    return pad is not None and pad in (eos if isinstance(eos, list) else [eos])


def _read_reads_eos(config: Json, path: Path) -> bool:
    """Return whether the score is read at the EOS, from a reward model's config.json.

    Models of others do not say it. Transformers reads the score at the last token that is not padding: before the EOS,
    where that is the padding.
    """
    said = config.get(READS_EOS)
    if said is None:
        return not pads_with_eos(config)
    if not isinstance(said, bool):
        raise CheckpointError(
            f"{path / CONFIG} has {READS_EOS}={shown(repr(said))}, which is neither true nor false: restore it",
            key=READS_EOS,
            value=said,
            where=path / CONFIG,
        )
    return said


def _check_sizes(path: Path) -> None:
    """Check that a checkpoint's files are complete. `megarl.checkpoint.verify` compares checksums, once per run."""
    try:
        files = read_json(path / MANIFEST)["files"]
        wrong = [name for name, (size, _) in files.items() if (path / name).stat().st_size != size]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as problem:
        raise CheckpointError(f"checkpoint {path} is not whole ({problem})", where=path) from None
    if wrong:
        raise CheckpointError(
            f"checkpoint {path} is not whole: {wrong[0]} differs in size from its {MANIFEST}",
            key=wrong[0],
            where=path,
        )


def read_config(path: Path) -> Json:
    """Read config.json of a Hugging Face folder."""
    try:
        return parse_object(read_text(path / CONFIG))
    except UnreadableError as problem:
        raise CheckpointError(f"{path / CONFIG} {problem}: restore it", where=path / CONFIG) from None


def tokenizer_of(folder: Path) -> tuple[str, str | None] | None:
    """Return kind and path of the tokenizer whose files are in a folder."""
    marker = folder / "megarl_tokenizer.json"
    if is_file(marker):
        kind, _ = _tokenizer_in({**read_marker(folder), "path": str(folder)}, str(marker))
        return kind, None if kind == "bytes" else str(folder)
    if any(is_file(folder / name) for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json")):
        return "huggingface", str(folder)
    return ("sentencepiece", str(folder)) if is_file(folder / "tokenizer.model") else None


def _tokenizer_in(card: Any, where: str) -> tuple[str, str | None]:
    """Return kind and path of the tokenizer in a model card."""
    kind, path = (card.get("kind"), card.get("path")) if isinstance(card, dict) else (None, None)
    if kind not in KINDS or not (path is None or isinstance(path, str)):
        raise CheckpointError(
            f"{where} does not name a tokenizer ({shown(card)}): restore it, or set tokenizer.path",
            key="tokenizer",
            value=card,
            where=where,
        )
    return kind, path


def unfit_dtype(where: str | Path, name: str, dtype: torch.dtype | str) -> CheckpointError:
    """Return the error for a stored tensor whose dtype is not valid for weights."""
    return CheckpointError(
        f"{where}: {name} has dtype {dtype}, which is not supported for weights", key=name, value=dtype, where=where
    )


def widest_dtype(dtypes: list[Any]) -> torch.dtype:
    """Return the dtype that represents all of the given ones without rounding."""
    result: torch.dtype = dtypes[0]
    for dtype in dtypes[1:]:
        result = torch.promote_types(result, dtype)
    return result
