"""One transformer layer: attention and MLP in sequence, or in parallel after one norm or two."""

import torch.nn.functional as F
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import BaseTransformerLayer, get_transformer_layer_offset
from torch import Tensor, nn

from megarl.models.attention import Context, SelfAttention
from megarl.models.config import GPTConfig
from megarl.models.experts import ExpertLayer
from megarl.models.kernels import kernels


class Layer(MegatronModule, BaseTransformerLayer):
    """Pre-norm layer with Megatron's parameter names, so that its checkpoints are compatible.

    The batch's `Context` is passed as `packed_seq_params`, the argument that Megatron's block passes to layers
    unchanged (also under activation recomputation).
    """

    def __init__(
        self,
        config: GPTConfig,
        layer_number: int = 1,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=config)
        assert pg_collection is not None
        self.config: GPTConfig = config
        # 1-based number in the whole model; Megatron's block passes the number within the stage.
        self.layer_number = layer_number + get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank())
        parts = kernels(config.kernels)
        norm = parts.norm(config.normalization)
        self.input_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.self_attention = SelfAttention(config, self.layer_number, pg_collection)
        self.pre_mlp_layernorm: nn.Module | None = None
        if config.parallel_residual != "one_norm":
            self.pre_mlp_layernorm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp: MLP | ExpertLayer
        if config.has_experts(self.layer_number):
            self.mlp = ExpertLayer(config, self.layer_number, pg_collection)
        else:
            self.mlp = MLP(
                config=config,
                submodules=MLPSubmodules(linear_fc1=parts.column, linear_fc2=parts.row),
                ffn_hidden_size=config.ffn_hidden_size,
                tp_group=pg_collection.tp,
            )

    def forward(self, hidden_states: Tensor, packed_seq_params: Context, **_: object) -> tuple[Tensor, None]:
        """Map hidden states [time, batch, hidden] to the same shape; the second result is Megatron's unused context."""
        normed = self.input_layernorm(hidden_states)
        attended = self.self_attention(normed, packed_seq_params)
        if self.config.parallel_residual == "none":
            assert self.pre_mlp_layernorm is not None
            hidden_states = hidden_states + self._dropout(attended)
            return hidden_states + self._dropout(
                self._mlp(self.pre_mlp_layernorm(hidden_states), packed_seq_params)
            ), None
        if self.pre_mlp_layernorm is not None:
            normed = self.pre_mlp_layernorm(hidden_states)
        return hidden_states + self._dropout(attended) + self._dropout(self._mlp(normed, packed_seq_params)), None

    def _mlp(self, x: Tensor, context: Context | None = None) -> Tensor:
        output: Tensor
        output, bias = self.mlp(x, context) if isinstance(self.mlp, ExpertLayer) else self.mlp(x)
        return output if bias is None else output + bias

    def _dropout(self, x: Tensor) -> Tensor:
        rate = self.config.hidden_dropout
        if rate == 0.0 or not self.training:
            return x
        if self.config.sequence_parallel:  # each rank has different tokens and must sample a different mask
            with get_cuda_rng_tracker().fork():
                return F.dropout(x, rate)
        return F.dropout(x, rate)
