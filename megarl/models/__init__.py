"""GPT models built on Megatron's parallel layers: shape, attention, layers, heads."""
