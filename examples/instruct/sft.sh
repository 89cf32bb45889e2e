#!/usr/bin/env bash
# Step 1: fine-tune on instructions with good and bad answers. bash examples/instruct/sft.sh [key=value ...]
# Without model.path it is a small model with random weights; with it, also give a learning rate for learned weights.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_sft \
    "data.train=['$here/tasks.py:answers']" data.eval=[] data.seq_length=192 \
    model.num_layers=2 model.hidden_size=64 optim.lr=5e-3 trainer.max_steps=300 \
    run.dir=runs/instruct/sft "$@"
