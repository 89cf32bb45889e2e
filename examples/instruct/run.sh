#!/usr/bin/env bash
# The whole chain: fine-tuning, reward model, PPO, and how good answers are before and after PPO.
# bash examples/instruct/run.sh; it writes to runs/instruct, and takes about two minutes of CPU time.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
python=${PYTHON:-python}
bash "$here/sft.sh"
bash "$here/rm.sh"
bash "$here/ppo.sh"
"$python" "$here/tasks.py" messages > runs/instruct/messages.jsonl
for step in sft ppo; do
    rm -f "runs/instruct/$step.jsonl"
    "$python" -m megarl.generate "model.path=runs/instruct/$step" prompts=runs/instruct/messages.jsonl \
        rollout.n=4 rollout.max_new_tokens=96 "out=runs/instruct/$step.jsonl"
done
"$python" "$here/tasks.py" utility runs/instruct/sft.jsonl runs/instruct/ppo.jsonl
