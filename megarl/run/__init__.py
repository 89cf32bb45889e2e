"""Runs a checked configuration: the run folder and its lock, the Trainer, the loggers, and the exit code."""
