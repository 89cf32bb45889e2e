#!/usr/bin/env bash
#SBATCH --job-name=megarl-mine --exclusive --mem=0 --requeue --open-mode=append --signal=USR1@300
# From this folder: sbatch --nodes=2 --gpus-per-node=8 launch.sh [key=value ...]; see README.md
[[ -e conf/mine.yaml ]] || { echo "error: $PWD has no conf/mine.yaml: submit from the project's folder" >&2; exit 2; }
python=$(cat .megarl-python 2>/dev/null)
[[ -x $python ]] || python=python3
if [[ -z ${MEGARL_IMAGE:-} ]]; then # in a container, MEGARL_PYTHON is one of the image
  python=${MEGARL_PYTHON:-$python}
  export MEGARL_PYTHON=$python
fi
launchers=$("$python" -c 'from megarl.config.resources import launchers_folder; print(launchers_folder())') || exit 2
source "$launchers/shared.sh" && launch ppo +conf=mine "$@"
