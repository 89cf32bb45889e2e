"""Typed configuration: the schema, its composition from presets and arguments, checks made before building.

Nothing here imports torch, Megatron or Lightning, so `--help` and configuration errors answer at once.
"""
