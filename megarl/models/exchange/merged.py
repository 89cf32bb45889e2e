"""A stored model with an adapter merged into its weights while they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megarl.config.sections.adapter import AdapterConfig
from megarl.disk import shown
from megarl.errors import CheckpointError
from megarl.models.adapter_spec import ADAPTER, AdapterSpec
from megarl.models.exchange.adapters import PeftAdapter, new_spec, split_name
from megarl.models.exchange.parameters import SCORE, TRUNK
from megarl.models.exchange.source import CheckpointSource, Source, tokenizer_of
from megarl.models.exchange.stored import Stored
from megarl.parallel.digest import digest


class CheckpointAdapter(CheckpointSource):
    """The adapter and the heads of an engine in a megarl checkpoint, which does not contain the weights beside it.

    Attributes:
        spec: the adapters' description.
        base: path of the model that they were trained beside; None for weights that were made from a seed.
        base_digests: checksums of that model's tensors, in `base_dtype`.
    """

    spec: AdapterSpec
    base: str | None
    base_digests: dict[str, int]
    base_dtype: torch.dtype

    def _read_card(self, card: Any) -> None:
        super()._read_card(card)
        where = f"the card of checkpoint {self.path}"
        try:
            found = card["adapter"]
            settings = AdapterConfig(
                kind=found["kind"],
                rank=int(found["rank"]),
                alpha=float(found["alpha"]),
                rslora=bool(found["rslora"]),
                dropout=float(found["dropout"]),
                targets=[str(target) for target in found["targets"]],
            )
            self.spec = new_spec(settings, self.model, str(found["family"]))
            self.base = None if found["base"] is None else str(found["base"])
            self.base_digests = {str(name): int(value) for name, value in found["base_digests"].items()}
            self.base_dtype = getattr(torch, found["base_dtype"])
        except (LookupError, TypeError, ValueError, AttributeError) as problem:
            raise CheckpointError(
                f"{where} does not describe its adapter ({shown(problem)}): it is damaged, choose another",
                key="adapter",
                where=where,
            ) from None

    def _sort(self, parts: Any) -> None:
        self._shapes = {}
        self._parts = {}
        for part in parts:
            name = part.key.removeprefix(f"{self.engine}.")
            if name != part.key and not name.startswith(("optimizer.", "optimizer_")):
                self._parts.setdefault(name, []).append(part)
        described = {
            name: Stored(found[0].tensor_shape, getattr(torch, found[0].dtype)) for name, found in self._parts.items()
        }
        strange = [name for name in described if name.startswith(TRUNK) and ADAPTER not in name]
        if strange or not any(ADAPTER in name for name in described):
            raise CheckpointError(f"checkpoint {self.path} has no adapter of {self.engine}", where=self.path)
        self.heads = {name: stored for name, stored in described.items() if not name.startswith(TRUNK)}
        self.has_output = SCORE not in self.heads
        self.left_out = {}
        self.dtype = next(stored.dtype for name, stored in described.items() if ADAPTER in name)  # type: ignore[assignment]
        self.stored = (len(described), sum(stored.bytes for stored in described.values()))

    @property
    def names(self) -> set[str]:
        """Our names of all tensors that it contains."""
        return set(self._parts)

    def adapts(self, layer: int, module: str) -> bool:
        """Return whether a part of a linear layer has factors in this layer of the transformer."""
        return any(module in parts.modules for parts in self.spec.at(layer).values())


class MergedSource(Source):
    """Reads as the whole model that an adapter makes of another one, in the other one's dtype.

    Attributes:
        base_name: the path or hub name of the other model, by which an adapter refers to it.
        exact: whether adapted weights are in float32 instead, so that only the writer rounds them.
    """

    kind = "adapter"

    def __init__(self, base: Source, adapter: PeftAdapter | CheckpointAdapter, base_name: str) -> None:
        self.base, self.adapter, self.base_name, self.exact = base, adapter, base_name, False
        self.path, self.model, self.vocab_size = adapter.path, base.model, base.vocab_size
        self.family, self.dtype, self.left_out = base.family, base.dtype, base.left_out
        told = adapter if isinstance(adapter, CheckpointAdapter) else base  # a checkpoint has a card of its own
        self.tokenizer, self.token_ids, self.chat_template = told.tokenizer, told.token_ids, told.chat_template
        self.score_moments, self.score_reads_eos = told.score_moments, told.score_reads_eos
        self.reward_kind, self.tokenizer_files = told.reward_kind, told.tokenizer_files
        if told is base and (own := tokenizer_of(adapter.path)) is not None:  # PEFT users save it beside the adapter
            self.tokenizer, self.tokenizer_files = own, adapter.path
        self.heads = {**base.heads, **adapter.heads}
        self.has_output = base.has_output and SCORE not in adapter.heads
        self.stored = base.stored
        self._adapted = {f"{name.partition('.adapter.')[0]}.weight" for name in adapter.names if ".adapter." in name}
        if lost := self._adapted - base.names:
            raise CheckpointError(
                f"{adapter.path} adapts {min(lost)}, which {base.path} does not have", key=min(lost), where=adapter.path
            )

    @property
    def checkpoints(self) -> list[Path]:
        """The megarl checkpoints that it is read from, whose checksums can be compared."""
        own = [self.adapter.path] if isinstance(self.adapter, CheckpointAdapter) else []
        return [*self.base.checkpoints, *own]

    def read(self, name: str) -> Tensor:
        """Return a whole tensor by our name, with the adapter merged."""
        if name in self.adapter.heads:
            return self.adapter.read(name)
        whole = self.base.read(name)
        self._check(name, whole)
        if name not in self._adapted:
            return whole
        weight = self._merged(name, whole)
        return weight if self.exact else weight.to(whole.dtype)

    def rows(self, name: str, first: int, last: int) -> Tensor:
        """Return rows first ... last - 1 of a tensor."""
        if name in self._adapted or name in self.adapter.heads:
            return self.read(name)[first:last]
        return self.base.rows(name, first, last)

    def _check(self, name: str, whole: Tensor) -> None:
        """Raise if a tensor of the other model is not the one that the adapter was trained beside."""
        if not isinstance(self.adapter, CheckpointAdapter):
            return  # PEFT's folders have no checksums
        wanted = self.adapter.base_digests.get(name)
        if wanted is not None and digest(whole.to(self.adapter.base_dtype)) != wanted:
            raise CheckpointError(
                f"{name} of {self.base.path} is not what the adapter {self.path} was trained beside, which was "
                f"{self.adapter.base or 'made from a seed'}: put that model back",
                key=name,
                where=self.base.path,
            )

    def _merged(self, name: str, whole: Tensor) -> Tensor:
        linear, spec = name.removesuffix(".weight"), self.adapter.spec
        up, down = (self.adapter.read(f"{linear}.adapter.{factor}").float() for factor in ("up", "down"))
        weight = whole.float()
        layer, place, _ = split_name(f"{linear}.adapter.up")
        parts = spec.at(layer)[place]
        for number, (module, rows) in enumerate(zip(parts.modules, parts.rows, strict=True)):
            if not self.adapter.adapts(layer, module):
                continue
            factors = down[number * spec.rank : (number + 1) * spec.rank]
            weight[rows] = weight[rows] + spec.scaling * (up[rows] @ factors)
            if spec.kind == "dora":
                magnitude = self.adapter.read(f"{linear}.adapter.magnitude").float()[rows]
                if magnitude.any():  # a PEFT folder may lack this module in some layers
                    lengths = torch.linalg.norm(weight[rows], dim=1)
                weight[rows] *= torch.where(lengths > 0, magnitude / lengths, 1.0)[:, None]
        return weight
