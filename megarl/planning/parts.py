"""The kinds of layers of a pipeline stage, and the positions that they run over.

A GPT has one kind, or two if only some of its layers have experts. An encoder-decoder has two, over one tensor: a
layer changes the positions of its own part and passes those of the other on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from megarl.config.sections.model import ModelConfig
from megarl.models.flops import layers_with_gradients
from megarl.parallel.layout import Layout
from megarl.planning.work import Work


@dataclass(frozen=True)
class Positions:
    """The positions of a microbatch as a layer has them.

    Attributes:
        bins: number of bins.
        time: positions of a bin that the layer changes.
        other: positions of a bin that it passes on unchanged: those of the other part of an encoder-decoder.
        crosses: whether the layer attends to the others: a decoder's layer does.
        routed: whether it sends them to experts.
        ranks: number of ranks that share a bin (`parallel.cp`). This one changes `time` of its positions, and attends
            to those of all.
    """

    bins: int
    time: int
    other: int = 0
    crosses: bool = False
    routed: bool = False
    ranks: int = 1

    @property
    def tokens(self) -> int:
        """Number of positions that the layer changes."""
        return self.bins * self.time

    @property
    def whole(self) -> int:
        """Number of positions of the hidden states that layers pass on."""
        return self.bins * (self.time + self.other)


@dataclass(frozen=True)
class Part:
    """Equal layers of a pipeline stage.

    Attributes:
        layers: their number.
        trained: how many of them compute gradients, and so keep activations.
        at: the positions that they run over.
        is_encoder: whether they are an encoder's. All others have a key-value cache in generation.
        is_last: whether the last layer of an encoder is among them, which ends with a norm.
    """

    layers: int
    trained: int
    at: Positions
    is_encoder: bool = False
    is_last: bool = False


def trained_parts(work: Work, stage: int) -> tuple[Part, ...]:
    """Return what `parts_of` does for a microbatch of training sequences, as a rank computes it."""
    return parts_of(work, stage, work.micro, work.computed, ranks=work.layout.cp)


def parts_of(work: Work, stage: int, bins: int, read: tuple[int, int], *, ranks: int = 1) -> tuple[Part, ...]:
    """Return the kinds of layers of a pipeline stage, in the order of the layers.

    Args:
        work: the run.
        stage: the pipeline stage.
        bins: number of bins of a pass.
        read: positions of a bin that a rank computes in the encoder and in the decoder (`Work.computed`).
        ranks: number of ranks that share a bin.
    """
    encoder, decoder = read
    model, share = work.model, work.model.layers // work.layout.pp
    if model.experts is not None:
        return _parts_with_experts(work, stage, Positions(bins, decoder, ranks=ranks))
    first, end = stage * share, (stage + 1) * share
    frozen = model.layers - layers_with_gradients(model, work.adapter)
    split = model.encoder_layers

    def trained(start: int, stop: int) -> int:
        return stop - max(start, min(stop, frozen))

    found = []
    if first < split:
        stop = min(end, split)
        at = Positions(bins, encoder, decoder)
        found.append(Part(stop - first, trained(first, stop), at, is_encoder=True, is_last=stop == split))
    if end > split:
        start = max(first, split)
        at = Positions(bins, decoder, encoder, crosses=split > 0, ranks=ranks)
        found.append(Part(end - start, trained(start, end), at))
    return tuple(found)


def _parts_with_experts(work: Work, stage: int, at: Positions) -> tuple[Part, ...]:
    """Return the layers of a stage without and with experts, of which one kind may be missing."""
    model = work.model
    layers = layers_of_stage(model, work.layout, stage)
    frozen = model.layers - layers_with_gradients(model, work.adapter)
    found = []
    for routed in (False, True):
        mine = [layer for layer in layers if model.has_experts(layer) == routed]
        if mine:
            found.append(Part(len(mine), sum(layer >= frozen for layer in mine), replace(at, routed=routed)))
    return tuple(found)


def layers_of_stage(model: ModelConfig, layout: Layout, stage: int) -> list[int]:
    """Return the numbers, from 0, of the layers on a pipeline stage, in all of its chunks."""
    size = model.layers // (layout.pp * layout.vpp)
    starts = [(chunk * layout.pp + stage) * size for chunk in range(layout.vpp)]
    return [start + number for start in starts for number in range(size)]


def stages_that_differ(layout: Layout, model: ModelConfig) -> list[int]:
    """Return one stage of each kind: the first, one in the middle, and the last; in the middle one for each number of
    layers with experts."""
    return sorted({like(layout, model, stage) for stage in range(layout.pp)})


def like(layout: Layout, model: ModelConfig, stage: int) -> int:
    """Return the first stage that holds as much as a stage."""
    if stage in (0, layout.pp - 1):
        return stage

    def with_experts(number: int) -> int:
        return sum(model.has_experts(layer) for layer in layers_of_stage(model, layout, number))

    if model.experts is None or not model.experts.dense_layers:
        return 1
    wanted = with_experts(stage)
    return next(number for number in range(1, layout.pp) if with_experts(number) == wanted)
