#!/usr/bin/env bash
# Train a small T5 and its values on rated answers, and evaluate what it says with and without the values.
# bash examples/t5_sentiment/ilql.sh [key=value ...]; without model.path the T5 has random weights.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_ilql \
    model.encoder.num_layers=2 model.num_layers=2 model.position=relative model.hidden_size=64 model.num_heads=4 \
    model.activation=geglu \
    "data.train=['$here/samples.py:rated']" data.eval=[megarl.tasks.sentiment:held_out] data.cache=null \
    reward.fn=megarl.rewards.builtin:sentiment rollout.max_new_tokens=48 eval.n=4 'eval.sweep.beta=[0,1,4]' \
    ilql.target_alpha=0.1 optim.lr=2e-3 optim.schedule=constant optim.warmup_steps=0 \
    trainer.global_batch_size=32 trainer.micro_batch_size=32 trainer.max_steps=400 trainer.eval_every=100 \
    run.dir=runs/t5_sentiment "$@"
