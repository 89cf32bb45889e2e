#!/usr/bin/env bash
# Shows that this machine computes right, then runs the command and passes notices of the end on to it.
# MEGARL_SELFTEST: settings of the self-test (default: tp=2 where two processes can run), or skip.
# A run that was stopped early, with a checkpoint, ends with 143, which asks whoever started the container for another.
set -uo pipefail

# The CPU image has none, also on a machine with a GPU.
readonly IMPORT_TRANSFORMER_ENGINE='
import importlib.util
if importlib.util.find_spec("transformer_engine"):
    import transformer_engine.pytorch'

gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
settings=${MEGARL_SELFTEST:-tp=$([[ $gpus -eq 1 ]] && echo 1 || echo 2)}
if [[ $settings != skip ]]; then
  # In a world of its own: an operator may have described the job's in these variables.
  # shellcheck disable=SC2086 # several settings, separated by spaces
  env -u RANK -u LOCAL_RANK -u WORLD_SIZE -u MASTER_ADDR -u MASTER_PORT python -m megarl.selftest $settings || exit
  # Only here is there a driver, without which it cannot be imported.
  if [[ $gpus -gt 0 ]] && ! told=$(python -c "$IMPORT_TRANSFORMER_ENGINE" 2>&1); then
    echo "warning: Transformer Engine cannot be imported (${told##*$'\n'}): set parallel.kernels=torch" >&2
  fi
fi
[[ $# -gt 0 ]] || exit 0

export MEGARL_STATUS_FILE=${MEGARL_STATUS_FILE:-/tmp/megarl-status-$$}
rm -f "$MEGARL_STATUS_FILE"
# The terminal stays the command's own, for a chat.
if [[ $1 == *torchrun ]]; then
  # It would die of SIGUSR1, and give its processes 30 seconds after SIGTERM: a phase wants more. They get both themselves.
  (trap "" USR1 && exec "$@") <&0 &
  child=$!
  trap 'kill -USR1 $(cat "/proc/$child/task/$child/children")' TERM USR1
else
  "$@" <&0 &
  child=$!
  trap 'kill -TERM "$child"' TERM
  trap 'kill -USR1 "$child"' USR1
fi
while :; do
  wait "$child" && code=0 || code=$?
  kill -0 "$child" 2>/dev/null || break # else a trap has interrupted the wait
done
# The wait that a trap interrupted gave the signal's number; the child may have ended right after it.
wait "$child" 2>/dev/null && again=0 || again=$?
[[ $again -eq 127 ]] || code=$again
[[ ! -e $MEGARL_STATUS_FILE ]] || code=143
exit "$code"
