"""Typed configuration: its keys, its composition from presets and arguments, and the checks before anything is built.

Nothing here imports torch, Megatron or Lightning, so `--help` and configuration errors answer at once.
"""
