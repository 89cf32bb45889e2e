#!/usr/bin/env bash
# The steps of the Dockerfile's stages `wheel` and `cpu` on a machine without a container engine: builds the wheel from
# the files that the build copies, installs it in a fresh environment under the pins, and starts it by the entry point.
#   bash docker/try_cpu.sh FOLDER     an empty folder, which keeps what is built and installed
# PYTHON (default: python3) has the image's version, 3.11. TORCH_INDEX is as for make (default: the image's index).
# Not tried: the base image, its user and its environment variables.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
folder=$(mkdir -p "$1" && cd "$1" && pwd)
dockerfile=$root/docker/Dockerfile
unset PYTHONPATH PIP_CONSTRAINT

stage() { sed -n "/^FROM .* AS $1\$/,/^FROM /p" "$dockerfile"; }
pin() { sed -n "s/^ARG $1=//p" "$dockerfile"; }
make_environment() { "${PYTHON:-python3}" -m venv "$1"; }

wanted=$(stage cpu | sed -nE 's/^FROM python:([0-9]+\.[0-9]+).* AS cpu$/\1/p')
found=$("${PYTHON:-python3}" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
[[ $found == "$wanted" ]] || { echo "error: Python $found, but the image has $wanted: set PYTHON" >&2 && exit 2; }

# --- stage `wheel`
mkdir "$folder/src" "$folder/elsewhere"
stage wheel | awk '$1 == "COPY" { for (i = 2; i < NF; i++) print $i }' | while read -r path; do
  cp -r "$root/$path" "$folder/src/"
done
find "$folder/src" -name __pycache__ -prune -exec rm -r {} +
make_environment "$folder/build"
"$folder/build/bin/pip" install -q "hatchling==$(pin HATCHLING_VERSION)"
"$folder/build/bin/pip" wheel -q --no-deps --no-build-isolation --wheel-dir "$folder/wheels" "$folder/src"

# --- stage `cpu`
index=${TORCH_INDEX-$(stage cpu | grep -o -e '--index-url [^ ]*')}
beside=$(stage cpu | sed -nE 's/^RUN pip install .*\/wheels\/\*\.whl ([a-z ]+).*/\1/p')
make_environment "$folder/cpu"
# shellcheck disable=SC2086 # several words each
{
  "$folder/cpu/bin/pip" install -q "torch==$(pin TORCH_CPU_VERSION)" $index
  "$folder/cpu/bin/pip" install -q --constraint "$root/constraints.txt" "$folder"/wheels/*.whl $beside
}

# --- docker run
export PATH=$folder/cpu/bin:$PATH
cd "$folder/elsewhere"
python -c 'import megarl; print("megarl is", megarl.__file__)'
MEGARL_SELFTEST="steps=2" "$root/docker/entrypoint.sh" python -m megarl.train_sft --help
MEGARL_SELFTEST=skip "$root/docker/entrypoint.sh" python -m megarl.train_sft +conf=gpt20b --cfg job
