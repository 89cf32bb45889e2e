"""The conformance suite, `python -m megarl.selftest --all`: every pair of features gives the numbers of one process.

`features.py` says what is paired, `training.py` trains a case, `compare.py` compares it with its reference,
`running.py` has processes train all cases, and `command.py` shows what came out.
"""
