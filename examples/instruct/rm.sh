#!/usr/bin/env bash
# Step 2: train a reward model on pairs of answers, from the model of step 1. bash examples/instruct/rm.sh [key=value ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_rm model.path=runs/instruct/sft \
    "data.train=['$here/tasks.py:pairs']" "data.eval=['$here/tasks.py:held_out_pairs']" data.seq_length=192 \
    rm.center_coef=0.01 rm.normalise=true optim.lr=1e-3 trainer.max_steps=100 trainer.eval_every=50 \
    run.dir=runs/instruct/rm "$@"
