"""Conversion of rollouts to rows, the same on every rank, and forward passes over all rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megarl.config.sections.model import ModelConfig
from megarl.models.adapter_spec import AdapterSpec
from megarl.models.flops import encoder_decoder_flops, flops_per_token, forward_flops_per_token
from megarl.models.gpt import GPT
from megarl.parallel.engine import Engine, ForwardFn, Outputs
from megarl.parallel.microbatches import plan_rows
from megarl.parallel.rows import Microbatch, Rows
from megarl.rollout.requests import Rollout
from megarl.rollout.routes import as_column


def rollouts_to_rows(rollouts: Sequence[Rollout]) -> Rows:
    """Return one row per rollout, on the host.

    The columns are rollout_logprobs [rows, time]; group [rows], the index of the prompt within the phase; prompt_tokens
    [rows], the length of the prompt; truncated [rows], whether the response ended at its maximum length; and
    weights_version [rows], the version of the weights that sampled it. Where they are recorded, routes [rows, time,
    layers x chosen] has the experts of each token.
    """
    lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts])
    shape = (len(rollouts), int(lengths.max()))
    tokens, action_mask, logprobs = torch.zeros(shape, dtype=torch.long), torch.zeros(shape), torch.zeros(shape)
    for row, rollout in enumerate(rollouts):
        start, stop = len(rollout.prompt), len(rollout.tokens)
        tokens[row, :stop] = torch.tensor(rollout.tokens)
        action_mask[row, start:stop] = 1.0
        logprobs[row, start:stop] = torch.tensor(rollout.logprobs)
    routes = as_column(rollouts, shape[1])
    return Rows(tokens, lengths, action_mask).with_columns(
        **({} if routes is None else {"routes": routes}),
        rollout_logprobs=logprobs,
        group=torch.tensor([rollout.prompt_id for rollout in rollouts]),
        prompt_tokens=torch.tensor([len(rollout.prompt) for rollout in rollouts]),
        truncated=torch.tensor([rollout.finish_reason == "length" for rollout in rollouts]),
        weights_version=torch.tensor([rollout.weights_version for rollout in rollouts]),
    )


def forward_rows(
    engine: Engine, rows: Rows, fn: ForwardFn, *, per_microbatch: int, share_bins: bool
) -> dict[str, Tensor]:
    """Return `fn`'s outputs [bins, time] as columns [rows, time] of all rows, on every rank. Each replica computes its
    share."""
    grid = engine.grid
    plan = plan_rows(rows.lengths, engine, per_microbatch=per_microbatch, share_bins=share_bins, prompts=rows.prompts)
    results = engine.forward(plan.microbatches(rows), fn)
    width = rows.tokens.shape[1]
    return {key: plan.collect([result[key] for result in results], grid, width) for key in results[0]}


def score_rows(engine: Engine, rows: Rows, *, per_microbatch: int, share_bins: bool) -> Tensor:
    """Return the score after each token of all rows, [rows, time] in host memory on every rank."""
    grid = engine.grid
    plan = plan_rows(
        rows.lengths,
        engine,
        per_microbatch=per_microbatch,
        share_bins=share_bins,
        read_last=True,
        prompts=rows.prompts,
    )

    def scores(model: GPT, hidden: Tensor, batch: Microbatch) -> Outputs:
        return {"scores": model.scores(hidden)}

    results = engine.forward(plan.microbatches(rows), scores)
    return plan.collect_states([result["scores"] for result in results], grid, rows.tokens.shape[1])


def at_last(columns: Tensor, rows: Rows) -> Tensor:
    """Return the entries [rows] of a column [rows, time] at the last token of each row."""
    return columns.gather(1, (rows.lengths - 1).clamp(min=0)[:, None]).squeeze(1)


def training_flops(
    model: ModelConfig,
    vocab_size: int,
    lengths: Tensor,
    adapter: AdapterSpec | None = None,
    prompts: Tensor | None = None,
) -> float:
    """Return the FLOPs of a forward and a backward pass over rows of these lengths [rows]. Last tokens are not inputs.

    Args:
        prompts: [rows], lengths of their prompts, which an encoder-decoder needs.
    """
    if model.encoder is not None:
        return _of_both(model, vocab_size, lengths, adapter, prompts)[1]
    tokens, length = _read(lengths)
    return tokens * flops_per_token(model, vocab_size, length, adapter)


def forward_flops(
    model: ModelConfig,
    vocab_size: int,
    lengths: Tensor,
    adapter: AdapterSpec | None = None,
    prompts: Tensor | None = None,
) -> float:
    """Return the FLOPs of a forward pass over rows; see `training_flops`."""
    if model.encoder is not None:
        return _of_both(model, vocab_size, lengths, adapter, prompts)[0]
    tokens, length = _read(lengths)
    return tokens * forward_flops_per_token(model, vocab_size, length, adapter)


def _of_both(
    model: ModelConfig, vocab_size: int, lengths: Tensor, adapter: AdapterSpec | None, prompts: Tensor | None
) -> tuple[float, float]:
    """Return the FLOPs of a forward pass, and of both, over the rows of an encoder-decoder."""
    if prompts is None:
        raise ValueError("the rows of an encoder-decoder have prompts")
    pairs = zip(prompts.tolist(), (lengths - prompts).clamp(min=1).tolist(), strict=True)
    each = [encoder_decoder_flops(model, vocab_size, prompt, response, adapter) for prompt, response in pairs]
    return sum(forward for forward, _ in each), sum(both for _, both in each)


def _read(lengths: Tensor) -> tuple[float, float]:
    """Return the number of tokens that rows of these lengths give a model, and their length weighted by tokens."""
    read = (lengths.double() - 1).clamp(min=1)
    return float(read.sum()), float((read**2).sum() / read.sum())
