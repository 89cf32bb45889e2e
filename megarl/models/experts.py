"""A mixture of experts in the place of a layer's MLP: a router sends each token to a few of many small MLPs.

Every process holds `1 / parallel.ep` of the experts, each split over the tensor-parallel ranks as an MLP is. A token
goes to the processes that hold its experts, and comes back, by exchanges of as many tokens as there are: none is
dropped or padded. Ranks must therefore make as many passes as each other; see `rollout/lockstep.py`.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    all_to_all,
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from torch import Tensor, nn

from megarl.algorithms.routing import balance_loss, choose, weights_of, z_loss
from megarl.config.sections.model import ExpertsConfig
from megarl.models.attention import Context
from megarl.models.config import GPTConfig
from megarl.models.kernels import kernels
from megarl.models.linear import affine
from megarl.parallel.context import TimeSlices
from megarl.parallel.grid import Grid
from megarl.parallel.rows import Origins
from megarl.parallel.shards import sharded_tensor


class Routes(NamedTuple):
    """The experts of each token [tokens, chosen], -1 in padding, and their weights."""

    experts: Tensor
    weights: Tensor


class ExpertLayer(nn.Module):
    """Router, experts and shared expert, with Megatron's parameter names."""

    def __init__(self, config: GPTConfig, number: int, groups: ProcessGroupCollection) -> None:
        """`number` is the layer's, from 1."""
        super().__init__()
        assert config.experts is not None
        assert config.experts.count is not None
        self.config, self.groups = config, groups
        self.experts_here = config.experts.count // groups.ep.size()
        self.first_here = self.experts_here * groups.ep.rank()
        self.router = Router(config, number, groups)
        self.experts = Experts(config, self.experts_here, groups)
        self.shared_experts: SharedExpert | None = None
        if config.experts.shared_ffn_size is not None:
            self.shared_experts = SharedExpert(config, config.experts.shared_ffn_size, groups)

    def forward(self, hidden: Tensor, context: Context | None) -> tuple[Tensor, None]:
        """Map hidden states [time, bins, hidden] to the same shape; the second result is Megatron's unused bias."""
        routes = self.router(hidden, context)
        if context is not None and context.cache is not None:
            context.cache.record(self.router.number, routes.experts.view(*hidden.shape[:2], -1))
        result = self._routed(hidden, routes)
        if self.shared_experts is not None:
            result = result + self.shared_experts(hidden)
        return result, None

    def serve(self) -> None:
        """Compute the tokens of other replicas in a pass of theirs, without any of this replica's own."""
        width = self.config.hidden_size
        place: dict[str, Any] = {"device": self.router.weight.device}
        tokens = torch.empty(0, width, dtype=self.config.params_dtype, **place)
        chosen = torch.empty(0, self.router.chosen, dtype=torch.long, **place)
        self._through_experts(tokens, Routes(chosen, chosen.float()))

    def _routed(self, hidden: Tensor, routes: Routes) -> Tensor:
        """Return the weighted sums of the experts' results [time, bins, hidden]."""
        group, width = self.groups.tp, hidden.shape[-1]
        tokens, (chosen, weights) = hidden.reshape(-1, width), routes
        if group.size() == 1:
            return self._through_experts(tokens, routes).view_as(hidden)
        # As around a dense MLP, each tensor-parallel rank reads all tokens, and its results are one of the summands.
        if self.config.sequence_parallel:
            tokens = gather_from_sequence_parallel_region(tokens, group=group)
            weights = gather_from_sequence_parallel_region(weights, group=group)
            chosen = gather_from_sequence_parallel_region(chosen, group=group)
            part = self._through_experts(tokens, Routes(chosen, weights))
            result: Tensor = reduce_scatter_to_sequence_parallel_region(part, group=group)
            return result.view_as(hidden)
        tokens = copy_to_tensor_model_parallel_region(tokens, group=group)
        weights = copy_to_tensor_model_parallel_region(weights, group=group)
        part = self._through_experts(tokens, Routes(chosen, weights))
        result = reduce_from_tensor_model_parallel_region(part, group=group)
        return result.view_as(hidden)

    def _through_experts(self, tokens: Tensor, routes: Routes) -> Tensor:
        """Return the weighted sum of the results of each token's experts [tokens, hidden], of this rank's slices of
        them."""
        chosen, weights = routes.experts.flatten(), routes.weights.flatten()
        count = self.experts_here * self.groups.ep.size()
        order = chosen.argsort(stable=True)  # padding comes first
        sizes = torch.bincount(chosen + 1, minlength=count + 1)
        order = order[int(sizes[0]) :]
        token = order // self.router.chosen
        sent, sizes = tokens[token], sizes[1:]
        here = self.groups.ep.size() == 1
        results = self.experts(sent, sizes.tolist()) if here else self._elsewhere(sent, sizes)
        results = results * weights[order, None].to(results.dtype)
        return torch.zeros_like(tokens).index_add(0, token, results)

    def _elsewhere(self, sent: Tensor, sizes: Tensor) -> Tensor:
        """Return the results of tokens [tokens, hidden] that are sorted by expert, of which `sizes` [experts] there
        are, from the ranks that hold the experts."""
        group, here = self.groups.ep, self.experts_here
        theirs = torch.empty_like(sizes)
        dist.all_to_all_single(theirs, sizes, group=group)
        to_ranks = sizes.view(-1, here).sum(1).tolist()
        from_ranks = theirs.view(-1, here)  # [ranks, experts]: how many tokens each rank has for each of mine
        parts = from_ranks.flatten().tolist()
        arriving = from_ranks.sum(1).tolist()
        received = all_to_all(group, sent, arriving, to_ranks)
        ranks, pieces = len(arriving), received.split(parts)
        by_expert = torch.cat([pieces[rank * here + expert] for expert in range(here) for rank in range(ranks)])
        results = self.experts(by_expert, from_ranks.sum(0).tolist())
        pieces = results.split([parts[rank * here + expert] for expert in range(here) for rank in range(ranks)])
        by_rank = torch.cat([pieces[expert * ranks + rank] for rank in range(ranks) for expert in range(here)])
        returned: Tensor = all_to_all(group, by_rank, to_ranks, arriving)
        return returned

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return Megatron's description of this rank's weight shards: each expert has the name of its own."""
        return {
            f"{prefix}{name}": sharded_tensor(f"{prefix}{global_name(name, self.first_here)}", parameter, self.groups)
            for name, parameter in self.named_parameters()
        }


LOCAL = "experts.local_experts."


def global_name(name: str, first: int) -> str:
    """Return a parameter's name with its expert counted from 0 over all ranks, where this rank's first is `first`."""
    head, _, rest = name.partition(LOCAL)
    if not rest:
        return name
    number, _, tail = rest.partition(".")
    return f"{head}{LOCAL}{int(number) + first}.{tail}"


class Router(nn.Module):
    """Chooses the experts of each token. Its losses enter the backward pass beside the model's loss."""

    def __init__(self, config: GPTConfig, number: int, groups: ProcessGroupCollection) -> None:
        super().__init__()
        assert config.experts is not None
        self.config, self.number, self.groups, self.slices = config, number, groups, TimeSlices(groups.cp)
        self.place = sum(config.has_experts(layer) for layer in range(1, number))  # among the layers with experts
        self.settings: ExpertsConfig = config.experts
        self.chosen, self.count = config.experts.chosen, int(config.experts.count or 0)
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.empty(self.count, config.hidden_size, **place))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        # What training passes add up since `begin`: the two losses, and the tokens of each expert. No buffer, whose
        # dtype would become the model's.
        self.sums = torch.zeros(2 + self.count, dtype=torch.float64, device=torch.cuda.current_device())

    def forward(self, hidden: Tensor, context: Context | None) -> Routes:
        """Choose the experts of hidden states [time, bins, hidden]."""
        tokens = hidden.reshape(-1, hidden.shape[-1])
        logits = affine(tokens.float(), self.weight.float(), None)
        experts, weights = choose(logits, self.chosen, normalise=self.settings.normalise)
        origins = None if context is None else context.origins
        if origins is None:
            return Routes(experts, weights)
        rows = self._mine(origins.rows).t().reshape(-1)
        if origins.routes is not None:
            named = self._mine(origins.routes[..., self.place * self.chosen : (self.place + 1) * self.chosen])
            named = named.transpose(0, 1).reshape(-1, self.chosen).long()
            experts = torch.where(named >= 0, named, experts)
            weights = weights_of(logits, experts, normalise=self.settings.normalise)
        experts = experts.masked_fill((rows == 0)[:, None], -1)
        if self.training:
            weights = self._with_losses(logits, experts, weights, rows, origins)
        return Routes(experts, weights)

    def _mine(self, rows: Tensor) -> Tensor:
        """Return the part of [bins, time, ...] that this rank has the tokens of."""
        rows = self.slices.mine(rows)
        if not self.config.sequence_parallel or self.groups.tp.size() == 1:
            return rows
        mine: Tensor = rows.chunk(self.groups.tp.size(), dim=1)[self.groups.tp.rank()]
        return mine

    def _with_losses(self, logits: Tensor, experts: Tensor, weights: Tensor, rows: Tensor, origins: Origins) -> Tensor:
        """Return the weights, whose backward pass adds the gradients of the losses of the router."""
        where = rows > 0
        logits, rows, experts = logits[where], rows[where], experts[where]
        lengths = torch.bincount(origins.rows.flatten())
        lengths[0] = 1
        counts = torch.zeros(len(lengths), self.count, device=logits.device)
        counts.view(-1).index_add_(
            0, (rows[:, None] * self.count + experts).flatten(), torch.ones(experts.numel(), device=logits.device)
        )
        loads = counts.sum(0)
        if self.config.sequence_parallel and self.groups.tp.size() > 1:  # a row's tokens are on several ranks
            dist.all_reduce(counts, group=self.groups.tp)
        if self.slices.size > 1:
            dist.all_reduce(counts, group=self.groups.cp)
        total, settings = origins.total, self.settings
        with torch.set_grad_enabled(torch.is_grad_enabled() and (settings.balance > 0 or settings.z_loss > 0)):
            balance = balance_loss(logits, counts, rows, lengths.clamp(min=1), chosen=self.chosen, total=total)
            z = z_loss(logits, total=total)
        # With full recomputation, a layer's first pass has no gradients. A second one exists only if something trains.
        if torch.is_grad_enabled() != (self.config.recompute_granularity == "full"):
            self.sums += torch.cat([torch.stack([balance, z]).detach(), loads]).double()
        if not balance.requires_grad:
            return weights
        loss = (settings.balance * balance + settings.z_loss * z) / self.config.expert_layers
        attached: Tensor = _WithLoss.apply(weights, loss, float(origins.copies))
        return attached


class _WithLoss(torch.autograd.Function):
    """The first argument, unchanged; its backward pass gives the loss a gradient of `scale`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, scale: float) -> Tensor:
        ctx.scale, ctx.like = scale, (loss.shape, loss.dtype, loss.device)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        shape, dtype, device = ctx.like
        return grads[0], torch.full(shape, ctx.scale, dtype=dtype, device=device), None


class Experts(nn.Module):
    """This rank's slices of its experts."""

    def __init__(self, config: GPTConfig, count: int, groups: ProcessGroupCollection) -> None:
        super().__init__()
        self.local_experts = nn.ModuleList(Expert(config, groups) for _ in range(count))
        # Tokens of each expert in training passes since `begin`: one without tokens has no gradient. Not a buffer:
        # the views of it would stay where they are if it moved.
        self.tokens = torch.zeros(count, dtype=torch.long, device=torch.cuda.current_device())
        for number, expert in enumerate(self.local_experts):
            for parameter in expert.parameters():
                parameter.multiplied_by = self.tokens[number]  # type: ignore[attr-defined]

    def forward(self, tokens: Tensor, sizes: list[int]) -> Tensor:
        """Map tokens [tokens, hidden], sorted by expert, to this rank's part of the results."""
        if self.training and torch.is_grad_enabled():
            self.tokens += torch.tensor(sizes, device=self.tokens.device)
        parts = tokens.split(sizes)
        return torch.cat([expert(part) for expert, part in zip(self.local_experts, parts, strict=True)])


class Expert(nn.Module):
    """One small MLP without biases. Nothing is communicated inside: its input is on all tensor-parallel ranks, and the
    result is this rank's summand."""

    def __init__(self, config: GPTConfig, groups: ProcessGroupCollection) -> None:
        super().__init__()
        width, gated = config.expert_width // groups.tp.size(), config.gated_linear_unit
        self.activation, self.gated = config.activation_func, gated
        self.linear_fc1 = ExpertLinear(config, (2 if gated else 1) * width, config.hidden_size, 0, 2 if gated else 1)
        self.linear_fc2 = ExpertLinear(config, config.hidden_size, width, 1, 1)
        if groups.ep.size() > 1:  # Megatron sums its gradient over the replicas that hold this expert
            for parameter in self.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Map [tokens, hidden] to the same shape."""
        inner = self.linear_fc1(x)
        if self.gated:
            gate, up = inner.chunk(2, dim=-1)
            inner = self.activation(gate) * up
        else:
            inner = self.activation(inner)
        result: Tensor = self.linear_fc2(inner)
        return result


class ExpertLinear(nn.Module):
    """A weight [out, in] whose axis `cut` is split over the tensor-parallel ranks, in `stride` blocks."""

    def __init__(self, config: GPTConfig, out: int, inner: int, cut: int, stride: int) -> None:
        super().__init__()
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = nn.Parameter(torch.empty(out, inner, **place))
        set_tensor_model_parallel_attributes(self.weight, True, cut, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return x @ weight.T."""
        return affine(x, self.weight, None)


class SharedExpert(MLP):
    """An MLP for every token, whose results a sigmoid scales by one number per token."""

    def __init__(self, config: GPTConfig, width: int, groups: ProcessGroupCollection) -> None:
        parts = kernels(config.kernels)
        submodules = MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row)
        sized = copy(config)
        sized.ffn_hidden_size = width  # Megatron's second product reads it there
        super().__init__(config=sized, submodules=submodules, ffn_hidden_size=width, tp_group=groups.tp)
        for module in self.modules():  # one configuration, of which generation switches sequence parallelism off
            for name in ("config", "shape_config"):
                if hasattr(module, name):
                    setattr(module, name, config)
        place: dict[str, Any] = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.gate_weight = nn.Parameter(torch.empty(1, config.hidden_size, **place))
        self.gate_weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: Tensor) -> Tensor:  # type: ignore[override]
        """Map hidden states [time, bins, hidden] to the same shape."""
        output, _ = super().forward(hidden)
        scaled: Tensor = output * torch.sigmoid(F.linear(hidden, self.gate_weight))
        return scaled


def expert_layers(models: Iterable[Any]) -> dict[int, ExpertLayer]:
    """Return the mixtures of experts of a rank's chunks by the numbers of their layers, from 1."""
    layers = (layer for model in models for layer in model.decoder.layers)
    return {layer.layer_number: layer.mlp for layer in layers if isinstance(layer.mlp, ExpertLayer)}


class RouterStats:
    """What the routers of an engine's model do in a training step: a `StepObserver`."""

    def __init__(self, models: Iterable[Any], config: GPTConfig, grid: Grid) -> None:
        self.layers, self.config, self.grid = expert_layers(models), config, grid

    def begin(self) -> None:
        """Forget the earlier steps."""
        for layer in self.layers.values():
            layer.router.sums.zero_()
            layer.experts.tokens.zero_()

    def stats(self) -> dict[str, float]:
        """Return the losses of the routers, averaged over layers, and how evenly the tokens of the whole batch were
        spread over the experts, on every rank."""
        assert self.config.experts is not None
        table = torch.zeros(self.config.num_layers, 2 + int(self.config.experts.count or 0), dtype=torch.float64)
        for number, layer in self.layers.items():
            table[number - 1] = layer.router.sums.cpu()
        if not self.config.sequence_parallel:  # each tensor-parallel rank has seen all tokens
            table /= self.grid.layout.tp
        table = table.to(self.grid.device)
        if self.grid.layout.world_size > 1:
            dist.all_reduce(table)
        present = [number for number in range(len(table)) if self.config.has_experts(number + 1)]
        losses, loads = table[present, :2].mean(dim=0).tolist(), table[present, 2:]
        return {
            "experts/balance_loss": losses[0],
            "experts/z_loss": losses[1],
            "experts/most_loaded": float((loads.amax(dim=1) / loads.mean(dim=1).clamp(min=1e-9)).max()),
            "experts/unused": float((loads == 0).double().mean()),
        }
