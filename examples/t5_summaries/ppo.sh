#!/usr/bin/env bash
# Clone a small T5 on summaries of any sentence, then train it by PPO to write that of the sentence that matters.
# bash examples/t5_summaries/ppo.sh [key=value ...]; without model.path the T5 has random weights.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_ppo \
    model.encoder.num_layers=2 model.num_layers=2 model.position=relative model.hidden_size=64 model.num_heads=4 \
    model.activation=geglu \
    "data.train=['$here/tasks.py:reports']" "data.eval=['$here/tasks.py:held_out_reports']" \
    "clone.data=['$here/tasks.py:mixed_summaries']" clone.steps=500 clone.lr=2e-3 \
    "reward.fn='$here/tasks.py:overlap'" rollout.max_new_tokens=24 ppo.rollouts=128 ppo.inner_epochs=2 \
    ppo.kl_coef=0.02 optim.lr=5e-4 optim.schedule=constant optim.warmup_steps=0 \
    trainer.global_batch_size=32 trainer.micro_batch_size=32 trainer.max_phases=20 trainer.eval_every=5 \
    run.dir=runs/t5_summaries "$@"
