"""The kinds of layers of a pipeline stage, and the positions that they run over.

A GPT has one kind. An encoder-decoder has two, over one tensor: a layer changes the positions of its own part and
passes those of the other on.
"""

from __future__ import annotations

from dataclasses import dataclass

from megarl.models.flops import layers_with_gradients
from megarl.planning.work import Work


@dataclass(frozen=True)
class Positions:
    """The positions of a microbatch as a layer has them.

    Attributes:
        bins: number of bins.
        time: positions of a bin that the layer changes.
        other: positions of a bin that it passes on unchanged: those of the other part of an encoder-decoder.
        crosses: whether the layer attends to the others: a decoder's layer does.
    """

    bins: int
    time: int
    other: int = 0
    crosses: bool = False

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


def parts_of(work: Work, stage: int, bins: int, read: tuple[int, int]) -> tuple[Part, ...]:
    """Return the kinds of layers of a pipeline stage, in the order of the layers.

    Args:
        work: the run.
        stage: the pipeline stage.
        bins: number of bins of a pass.
        read: positions of a bin in the encoder and in the decoder (`Work.read`).
    """
    encoder, decoder = read
    model, share = work.model, work.model.layers // work.layout.pp
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
        at = Positions(bins, decoder, encoder, crosses=split > 0)
        found.append(Part(end - start, trained(start, end), at))
    return tuple(found)
