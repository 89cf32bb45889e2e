"""Callbacks for everything that is not the algorithm: measuring, displaying, recording and guarding a run.

Order matters where one reads what another logs: `Health`, then `Throughput`, then progress, then `Summary`, then
`Report`; and `StopOnFinding` before `Checkpoints`, so that the step that it stops at is not saved.
"""
