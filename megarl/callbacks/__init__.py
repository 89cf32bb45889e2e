"""What hangs on the Trainer's hooks and is not the algorithm: measuring, showing, recording, guarding a run.

Order matters where one reads what another logs: `Health`, then `Throughput`, then progress, then `Summary`.
"""
