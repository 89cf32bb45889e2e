#!/usr/bin/env bash
# For sites that forbid requeueing: a chain of jobs, each of which goes on where the one before it stopped.
# launchers/chain.sh COUNT [sbatch options] launchers/ppo.sh [+conf=PRESET] [key=value ...]
set -euo pipefail
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: $0 COUNT [sbatch options] launchers/ppo.sh [+conf=PRESET] [key=value ...]" >&2
  exit 2
fi
count=$1
shift
# One run for all jobs of the chain, unless the command line names it. A job leaves the next one to this chain.
export MEGARL_RUN_NAME=${MEGARL_RUN_NAME:-chain-$(date +%Y%m%d-%H%M%S)} MEGARL_REQUEUE=never
before=""
for ((link = 1; link <= count; link++)); do
  # afterany: a job that was stopped at its time limit has failed by SLURM's count, and one that had finished lets the
  # rest of the chain end at once.
  options=(--parsable --no-requeue --export=ALL)
  [[ -z $before ]] || options+=("--dependency=afterany:$before")
  before=$(sbatch "${options[@]}" "$@")
  before=${before%%;*}
  echo "$before"
done
