#!/usr/bin/env bash
# Step 2: let the model of step 1 prefer answers with more votes. bash examples/stack_llama/dpo.sh [key=value ...]
# It starts from the newest checkpoint of step 1, which is also the reference.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_dpo model.path=runs/stack_llama/sft \
    "data.train=['$here/questions.py:pairs']" "data.eval=['$here/questions.py:held_out_pairs']" \
    data.seq_length=160 dpo.beta=1 dpo.sft_coef=2 optim.lr=1e-4 trainer.max_steps=100 trainer.eval_every=20 \
    run.dir=runs/stack_llama/dpo "$@"
