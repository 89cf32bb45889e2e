"""TRL's function that samples responses."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from megarl.compat.trl.model import AutoModelForCausalLMWithValueHead


def respond_to_batch(
    model: AutoModelForCausalLMWithValueHead,
    queries: Tensor | Sequence[Tensor],
    txt_len: int = 20,
    top_k: int = 0,
    top_p: float = 1.0,
) -> list[Tensor]:
    """Return a response to each query, as tensors of token ids without the query. Those of an encoder-decoder begin
    with its start token.

    Args:
        model: the model.
        queries: token ids, [queries, time] or a list of [time].
        txt_len: maximum number of tokens; a response that ends earlier has EOS as its last token.
        top_k: number of tokens to sample among; 0 for all.
        top_p: share of the probability to sample from; 1 for all.
    """
    drawn = {"max_new_tokens": txt_len, "top_k": top_k or None, "top_p": None if top_p >= 1 else top_p}
    return model.as_tensors(model.sample(queries, **drawn), with_query=False)
