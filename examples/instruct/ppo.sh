#!/usr/bin/env bash
# Step 3: train the model of step 1 by PPO against the reward model. bash examples/instruct/ppo.sh [key=value ...]
# The utility is only measured: the policy learns from the reward model's scores alone.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
exec "${PYTHON:-python}" -m megarl.train_ppo model.path=runs/instruct/sft reward.model=runs/instruct/rm \
    "data.train=['$here/tasks.py:messages']" "data.eval=['$here/tasks.py:held_out_messages']" \
    "metric.fn='$here/tasks.py:utility'" rollout.max_new_tokens=96 ppo.rollouts=64 ppo.inner_epochs=2 ppo.kl_coef=0.1 \
    optim.lr=1e-3 optim.schedule=constant optim.warmup_steps=0 trainer.global_batch_size=32 trainer.micro_batch_size=32 \
    trainer.max_phases=20 trainer.eval_every=5 run.dir=runs/instruct/ppo "$@"
