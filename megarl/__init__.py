"""megarl trains large GPT models with reinforcement learning over Megatron-core."""

__version__ = "0.1.0"
