"""Prompts in, responses with log-probs out: generation on the Megatron model itself."""
