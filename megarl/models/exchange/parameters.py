"""The parameters of a whole GPT by their global names, from its shape alone, without building it.

Conversion and the checks of files use this; a test compares it with a model that was built.
"""

from megarl.config.sections.model import ModelConfig

Shapes = dict[str, tuple[int, ...]]
EMBEDDING = "embedding.word_embeddings.weight"
POSITIONS = "embedding.position_embeddings.weight"
OUTPUT = "output_layer.weight"
OUTPUT_BIAS = "output_layer.bias"
VOCABULARY = (EMBEDDING, OUTPUT, OUTPUT_BIAS)
TRUNK = ("embedding.", "decoder.", "output_layer.")  # prefixes of all parameters except those of megarl's heads
SCORE = "score_head.outer.weight"


def parameters(model: ModelConfig, vocab_size: int, *, output: bool = True) -> Shapes:
    """Return the shape of each whole tensor by name, vocabulary without padding, from the first to the last layer.

    `output` is whether there is an output layer: a reward model has none.
    """
    hidden = model.hidden_size
    shapes: Shapes = {EMBEDDING: (vocab_size, hidden)}
    if model.position == "learned":
        shapes[POSITIONS] = (model.max_positions + model.position_offset, hidden)
    for layer in range(model.layers):
        shapes |= {f"decoder.layers.{layer}.{name}": shape for name, shape in _layer(model, layer).items()}
    shapes |= _norm(model, "decoder.final_layernorm", hidden)
    if output and not model.tie_embeddings:
        shapes[OUTPUT] = (vocab_size, hidden)
    if output and model.lm_head_bias:
        shapes[OUTPUT_BIAS] = (vocab_size,)
    return shapes


def _layer(model: ModelConfig, layer: int) -> Shapes:
    hidden = model.hidden_size
    head_dim = model.head_width
    ffn = model.ffn_width
    qkv = head_dim * (model.num_heads + 2 * model.kv_heads)
    shapes = _norm(model, "input_layernorm", hidden)
    shapes |= _linear("self_attention.linear_qkv", (qkv, hidden), model.qkv_bias)
    shapes |= _linear("self_attention.linear_proj", (hidden, head_dim * model.num_heads), model.out_bias)
    if model.qk_norm:
        shapes |= _norm(model, "self_attention.q_layernorm", head_dim)
        shapes |= _norm(model, "self_attention.k_layernorm", head_dim)
    if model.parallel_residual != "one_norm":
        shapes |= _norm(model, "pre_mlp_layernorm", hidden)
    if model.has_experts(layer):
        return shapes | _experts(model)
    wide = 2 * ffn if model.is_gated else ffn
    shapes |= _linear("mlp.linear_fc1", (wide, hidden), model.mlp_bias)
    if model.encoder is not None:
        shapes |= _of_encoder_decoder(model, layer)
    return shapes | _linear("mlp.linear_fc2", (hidden, ffn), model.mlp_bias)


def _experts(model: ModelConfig) -> Shapes:
    """Return what a layer has in the place of an MLP."""
    assert model.experts is not None
    assert model.experts.count is not None
    hidden, wide = model.hidden_size, 2 if model.is_gated else 1
    shapes: Shapes = {"mlp.router.weight": (model.experts.count, hidden)}
    for expert in range(model.experts.count):
        name = f"mlp.experts.local_experts.{expert}"
        shapes[f"{name}.linear_fc1.weight"] = (wide * model.expert_width, hidden)
        shapes[f"{name}.linear_fc2.weight"] = (hidden, model.expert_width)
    if (shared := model.experts.shared_ffn_size) is not None:
        shapes["mlp.shared_experts.gate_weight"] = (1, hidden)
        shapes["mlp.shared_experts.linear_fc1.weight"] = (wide * shared, hidden)
        shapes["mlp.shared_experts.linear_fc2.weight"] = (hidden, shared)
    return shapes


def _of_encoder_decoder(model: ModelConfig, layer: int) -> Shapes:
    """Return what a layer of an encoder-decoder has besides that of a GPT."""
    assert model.encoder is not None
    hidden, attended = model.hidden_size, model.head_width * model.num_heads
    shapes: Shapes = {}
    if layer in (0, model.encoder_layers):
        shapes["self_attention.relative_positions"] = (model.encoder.buckets, model.num_heads)
    if layer < model.encoder_layers:
        return shapes | (_norm(model, "final_layernorm", hidden) if layer == model.encoder_layers - 1 else {})
    shapes |= _norm(model, "pre_cross_layernorm", hidden)
    shapes |= _linear("cross_attention.linear_q", (attended, hidden), model.qkv_bias)
    shapes |= _linear("cross_attention.linear_kv", (2 * attended, hidden), model.qkv_bias)
    return shapes | _linear("cross_attention.linear_proj", (hidden, attended), model.out_bias)


def _linear(name: str, shape: tuple[int, int], bias: bool) -> Shapes:
    return {f"{name}.weight": shape, **({f"{name}.bias": shape[:1]} if bias else {})}


def _norm(model: ModelConfig, name: str, width: int) -> Shapes:
    kinds = ("weight", "bias") if model.norm == "layernorm" else ("weight",)
    return {f"{name}.{kind}": (width,) for kind in kinds}
