#!/usr/bin/env bash
# Step 1: fine-tune a Llama on all answers. bash examples/stack_llama/sft.sh [key=value ...]
# Without model.path it is a tiny Llama with random weights; with it, also give a learning rate for learned weights.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_sft \
    "data.train=['$here/questions.py:answers']" "data.eval=['$here/questions.py:held_out_answers']" \
    model.num_layers=2 model.hidden_size=64 data.seq_length=160 optim.lr=5e-3 trainer.max_steps=300 trainer.eval_every=100 \
    run.dir=runs/stack_llama/sft "$@"
