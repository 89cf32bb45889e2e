#!/usr/bin/env bash
#SBATCH --job-name=megarl-rm --exclusive --mem=0 --requeue --open-mode=append --signal=USR1@300
# sbatch --nodes=2 --gpus-per-node=8 launchers/rm.sh [+conf=PRESET] [key=value ...]; see docs/clusters.md
here=${0%/*}; [[ -e $here/shared.sh ]] || here=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's|^ *Command=||p'); until [[ -e $here/shared.sh || $here != */* ]]; do here=${here%/*}; done
source "$here/shared.sh" && launch rm "$@"
