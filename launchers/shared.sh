# shellcheck shell=bash
# What every launcher does: look at the job, check it, start the processes, and start them again after a notice.
# `launch ALGORITHM [key=value ...]` is the one function that launchers call. docs/clusters.md tells the story.
#
# MEGARL_DRY_RUN=1        print the exact lines that would run, and run nothing but the check of the configuration
# MEGARL_LAUNCH           srun: one task per process (default); torchrun: one torchrun per node
# MEGARL_DEVICE           gpu or cpu (default: gpu where the job has one)
# MEGARL_PER_NODE         processes per node (default: the node's GPUs; without any, the job's tasks per node)
# MEGARL_IMAGE            container image: anything pyxis takes, or a file or URI for apptainer (default: none)
# MEGARL_CONTAINER        pyxis or apptainer (default: pyxis where srun has it)
# MEGARL_MOUNTS           more folders that the container sees, as /a:/a,/b:/b
# MEGARL_PYTHON           interpreter (default: .venv/bin/python beside launchers/, else python3; in a container python)
# MEGARL_REQUEUE          auto: requeue the job when it stops at a notice (default); never: leave that to others
# MEGARL_RESTARTS         how often processes that died are started again inside the job (default 3)
# MEGARL_RUN_NAME         run.name, where the command line has neither that nor run.dir (default: ALGORITHM-jobNUMBER)

launch() {
  set -euo pipefail
  algorithm=$1
  shift
  find_ourselves
  look_at_job
  choose_run_folder "$@"
  find_container
  training=("$python" -m "megarl.train_$algorithm" "${run_name[@]}" "${on_cpu[@]}" "$@")
  check_configuration
  choose_environment
  build_step
  if [[ -n ${MEGARL_DRY_RUN:-} ]]; then
    print_plan
    return
  fi
  mkdir -p "$console"
  check_nodes
  run_until_done
}

# --- what there is -----------------------------------------------------------------------------------------------------

find_ourselves() {
  launchers=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
  home=$(dirname "$launchers")
  if [[ -n ${MEGARL_IMAGE:-} ]]; then
    python=${MEGARL_PYTHON:-python}
  elif [[ -n ${MEGARL_PYTHON:-} ]]; then
    python=$MEGARL_PYTHON
  elif [[ -x $home/.venv/bin/python ]]; then
    python=$home/.venv/bin/python
  else
    python=python3
  fi
}

look_at_job() {
  job=${SLURM_JOB_ID:-$$}
  # SLURM says it anew at each start: a job of `sbatch --nodes=2-3` may come back from a requeue with another number.
  nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
  on_nodes=("--nodes=$nodes")
  local gpus=${SLURM_GPUS_ON_NODE:-}
  if [[ -z $gpus ]]; then
    # A site without GPU bookkeeping in SLURM: what this node sees. No driver is an answer too.
    gpus=$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)
  fi
  device=${MEGARL_DEVICE:-$([[ $gpus -gt 0 ]] && echo gpu || echo cpu)}
  local tasks=${SLURM_NTASKS_PER_NODE:-$((${SLURM_NTASKS:-$nodes} / nodes))}
  on_cpu=()
  case $device in
    gpu) per_node=${MEGARL_PER_NODE:-$gpus} ;;
    cpu)
      per_node=${MEGARL_PER_NODE:-$tasks}
      [[ -z ${MEGARL_DEVICE:-} ]] || on_cpu=(trainer.accelerator=cpu)
      ;;
    *) stop "MEGARL_DEVICE=$device is neither gpu nor cpu" ;;
  esac
  [[ $per_node -ge 1 ]] || stop "MEGARL_DEVICE=gpu, but the job has no GPU: sbatch --gpus-per-node=8, or MEGARL_DEVICE=cpu"
  world=$((nodes * per_node))
  cores=${SLURM_CPUS_ON_NODE:-$(nproc)}
  cores_each=$((cores > per_node ? cores / per_node : 1))
}

choose_run_folder() {
  # Fixed by the job's number, so that the job finds its run again after a requeue.
  local word name="" folder=""
  run_name=()
  for word in "$@"; do
    case $word in
      run.dir=*) folder=${word#run.dir=} ;;
      run.name=*) name=${word#run.name=} ;;
    esac
  done
  if [[ -z $name && -z $folder ]]; then
    name=${MEGARL_RUN_NAME:-$algorithm-job$job}
    run_name=("run.name=$name")
  fi
  # Each job has a folder of its own: a job whose run folder another holds must leave that one's files alone.
  console=${folder:-runs/$name}/console/$job
  [[ $console == /* ]] || console=$PWD/$console
}

choose_environment() {
  # Every variable can be set differently from outside; each is set here for the reason beside it.
  settings=()
  # Where the processes meet: the first node of the job, a port of the job's own (two jobs may share a node).
  setting MASTER_ADDR "$(address_of "$(first_node)")"
  setting MASTER_PORT "$((20000 + job % 10000))"
  setting WORLD_SIZE "$world"
  setting LOCAL_WORLD_SIZE "$per_node"
  # Lightning believes the numbers above only where torchrun is known to have set them; its own handling of SLURM would
  # requeue the job by itself, with a checkpoint in another format.
  setting TORCHELASTIC_RUN_ID "$job"
  # Left by a run that was stopped at a notice; see megarl/callbacks/preemption.py.
  setting MEGARL_STATUS_FILE "$console/status"
  # torch would start a thread per core of the node in each of the node's processes.
  setting OMP_NUM_THREADS "$((cores_each < 8 ? cores_each : 8))"
  # What a process says before it dies must not be lost in a buffer, and a crash in C code shows its Python lines.
  setting PYTHONUNBUFFERED 1
  setting PYTHONFAULTHANDLER 1
  # Tokenizers warn, or hang, where a process that has used their threads forks.
  setting TOKENIZERS_PARALLELISM false
  [[ $device == gpu ]] || return 0
  # Kernels start in the order in which they were queued, so that Megatron's communication overlaps its computation.
  setting CUDA_DEVICE_MAX_CONNECTIONS 1
  # Responses have all lengths: without it, memory is lost in pieces that no later tensor fits into. Read by torch 2.9
  # and newer, which warn of the old name, PYTORCH_CUDA_ALLOC_CONF.
  setting PYTORCH_ALLOC_CONF expandable_segments:True
  # A collective whose peer died ends after parallel.timeout_s with an error instead of waiting forever ...
  setting TORCH_NCCL_ASYNC_ERROR_HANDLING 1
  # ... also where the watchdog itself hangs, after these seconds. It also stands still in a healthy process, in long
  # allocations, when modules are loaded and while CUDA graphs are recorded: less time would kill such a run ...
  setting TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC 600
  # ... and the last collectives of each rank are written down then, which tells the rank that did not come.
  setting TORCH_NCCL_TRACE_BUFFER_SIZE 2000
  setting TORCH_NCCL_DUMP_ON_TIMEOUT 1
  setting TORCH_NCCL_DEBUG_INFO_TEMP_FILE "$console/nccl-trace-rank-"
  # Broken links and wrong interfaces are said, and nothing else.
  setting NCCL_DEBUG WARN
}

setting() {
  local value=${!1:-$2}
  export "$1=$value"
  settings+=("$1=$value")
}

first_node() {
  local list=${SLURM_JOB_NODELIST:-127.0.0.1}
  # node[003-010,12],other -> node003; a[1-2]b -> a1b
  sed -E 's/^([^[,]*)\[([^],-]+)[^]]*\]([^,]*).*/\1\2\3/; t; s/,.*//' <<<"$list"
}

address_of() {
  # A node's name is its address, except where the site gives it another (as for several nodes on one machine).
  local address=""
  if ! getent hosts "$1" >/dev/null && command -v scontrol >/dev/null; then
    address=$({ scontrol show node "$1" 2>/dev/null || true; } | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
  fi
  echo "${address:-$1}"
}

find_container() {
  in_step=() # words for srun
  inside=()  # words before the command
  [[ -n ${MEGARL_IMAGE:-} ]] || return 0
  local mounts="$PWD:$PWD,$home:$home${MEGARL_MOUNTS:+,$MEGARL_MOUNTS}" kind=${MEGARL_CONTAINER:-}
  if [[ -z $kind ]]; then
    kind=apptainer
    ! srun --help 2>/dev/null | grep -q -e --container-image || kind=pyxis
  fi
  case $kind in
    pyxis)
      # The image's Python only: a home folder may hold packages of another.
      in_step=("--container-image=$MEGARL_IMAGE" "--container-mounts=$mounts" "--container-workdir=$PWD" --no-container-mount-home)
      ;;
    apptainer)
      inside=(apptainer exec --no-home --bind "$mounts" --pwd "$PWD")
      [[ $device == cpu ]] || inside+=(--nv)
      inside+=("$MEGARL_IMAGE")
      ;;
    *) stop "MEGARL_CONTAINER=$kind is neither pyxis nor apptainer" ;;
  esac
}

# --- the lines that start a run ----------------------------------------------------------------------------------------

# Run in each task. A process's numbers are those of its SLURM task.
# shellcheck disable=SC2016
readonly NUMBERED='export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID GROUP_RANK=$SLURM_NODEID; exec "$@"'

# Run once per node under torchrun, which would itself die of SIGUSR1, and give its processes 30 seconds after SIGTERM:
# both are passed on to the processes, which stop at the next edge.
# shellcheck disable=SC2016
readonly FORWARDING='export PET_NODE_RANK=$SLURM_NODEID
(trap "" USR1; exec "$@") & agent=$!
trap '\''kill -USR1 $(cat "/proc/$agent/task/$agent/children")'\'' USR1 TERM
while :; do wait "$agent" && code=0 || code=$?; kill -0 "$agent" 2>/dev/null || break; done
wait "$agent" 2>/dev/null && again=0 || again=$?
[ "$again" -eq 127 ] || code=$again
exit "$code"'

build_step() {
  local tasks=$per_node script=$NUMBERED name=rank command=("${training[@]}") each=$cores_each
  if [[ ${MEGARL_LAUNCH:-srun} == torchrun ]]; then
    tasks=1 script=$FORWARDING name=node each=$cores
    command=("$python" -m torch.distributed.run "--nnodes=$nodes" "--nproc-per-node=$per_node"
      "--master-addr=$MASTER_ADDR" "--master-port=$MASTER_PORT" -m "${training[@]:2}")
  elif [[ ${MEGARL_LAUNCH:-srun} != srun ]]; then
    stop "MEGARL_LAUNCH=$MEGARL_LAUNCH is neither srun nor torchrun"
  fi
  step=(srun "${on_nodes[@]}" "--ntasks=$((nodes * tasks))" "--ntasks-per-node=$tasks" "--cpus-per-task=$each")
  # A site's --export=NONE would take the settings away from the processes.
  step+=(--export=ALL)
  # One rank's death ends the others at once instead of at their time-out.
  step+=(--kill-on-bad-exit=1)
  step+=("--output=$console/$name-%4t.log" --open-mode=append)
  # Every process sees all GPUs of its node and takes the one of its number: NCCL wants its peers visible.
  [[ $device == cpu ]] || step+=(--gpu-bind=none)
  step+=("${in_step[@]}" "${inside[@]}" bash -c "$script" "$name" "${command[@]}")
  first_log=$console/$name-0000.log
}

print_plan() {
  local one
  for one in "${settings[@]}"; do echo "export $one"; done
  quoted "${step[@]}"
}

quoted() {
  local word line=""
  for word in "$@"; do
    [[ $word =~ ^[A-Za-z0-9_./:=,@%+~-]+$ ]] || word="'${word//\'/\'\\\'\'}'"
    line+="$word "
  done
  echo "${line% }"
}

# --- checks, before nodes idle -----------------------------------------------------------------------------------------

# Run once per node: the GPUs are there, megarl is, and so is the run folder that the first node made.
# shellcheck disable=SC2016
readonly NODE_CHECK='
fail() { echo "error: $(hostname): $*" >&2; exit 2; }
gpus=$(nvidia-smi -L 2>/dev/null | wc -l)
[ "$2" = cpu ] || [ "$gpus" -ge "$3" ] || fail "$gpus GPUs are visible, $3 processes are to run here"
[ -d "$4" ] || fail "$4 is not visible: run.dir must be on a file system that all nodes share"
version=$("$1" -c "import megarl; print(megarl.__version__)") || fail "$1 cannot import megarl: set MEGARL_PYTHON or MEGARL_IMAGE"
echo "$(hostname): $gpus GPUs, megarl $version"'

# Composes the configuration as the run will, for as many processes as the job has; exits 2 with one line if it cannot.
# Its last line is the number of nodes to use, which launch.elastic=true may lower.
check_configuration() {
  local command=("$python" -m megarl.config.job "$algorithm" "$device" "$nodes" "$per_node" "${training[@]:3}")
  local starter=() used=""
  if [[ -n ${MEGARL_IMAGE:-} ]]; then
    [[ -z ${MEGARL_DRY_RUN:-} ]] || return 0
    starter=(srun --nodes=1 --ntasks=1 --export=ALL "${in_step[@]}" "${inside[@]}")
  fi
  used=$(in_checkout "${starter[@]}" "${command[@]}") || exit
  used=${used##*$'\n'}
  if [[ $used =~ ^[1-9][0-9]*$ && $used -lt $nodes ]]; then
    nodes=$used
    world=$((nodes * per_node))
    on_nodes=("--nodes=$nodes" --relative=0) # the first ones, as the processes meet at the first of the job
  fi
}

check_nodes() {
  in_checkout srun "${on_nodes[@]}" "--ntasks=$nodes" --ntasks-per-node=1 --export=ALL --kill-on-bad-exit=1 \
    "${in_step[@]}" "${inside[@]}" bash -c "$NODE_CHECK" check "$python" "$device" "$per_node" "$console" ||
    stop "the nodes are not ready (see above)"
}

# An installed megarl is found as it is; in a checkout, from any folder.
in_checkout() {
  local path=${PYTHONPATH:-}
  [[ ! -d $home/megarl ]] || path+=${path:+:}$home
  PYTHONPATH=$path "$@"
}

# --- running -----------------------------------------------------------------------------------------------------------

run_until_done() {
  local died=0 code
  touch "$first_log"
  # The job's own output shows what the first process says; the others' logs lie beside it.
  tail -n 0 -F "$first_log" 2>/dev/null &
  trap 'kill %1 2>/dev/null || true' EXIT
  trap : USR1 # a signal to the whole job is for its processes
  while :; do
    rm -f "$MEGARL_STATUS_FILE" "$MEGARL_STATUS_FILE.exit"
    in_checkout "${step[@]}" && code=0 || code=$?
    # torchrun ends with 1 whatever its processes end with.
    [[ ! -e $MEGARL_STATUS_FILE.exit ]] || code=$(<"$MEGARL_STATUS_FILE.exit")
    if [[ -e $MEGARL_STATUS_FILE ]]; then
      rm -f "$console/early"
      say "$(<"$MEGARL_STATUS_FILE")"
      requeue
    fi
    case $code in
      0) exit 0 ;;
      2 | 3 | 130) exit "$code" ;; # bad input, bad numbers: the same again next time; somebody's Ctrl-C
      138) # 128 + SIGUSR1: a notice before the run was up
        say "a notice came before training had begun"
        # Each time? Then the time limit leaves no room between the start and the notice.
        echo early >>"$console/early"
        [[ $(wc -l <"$console/early") -le 3 ]] || stop "that was the fourth time in a row: a longer --time, or a later --signal"
        requeue
        ;;
    esac
    died=$((died + 1))
    if [[ $died -gt ${MEGARL_RESTARTS:-3} ]]; then
      say "a process died (exit code $code) and MEGARL_RESTARTS=${MEGARL_RESTARTS:-3} is used up: see $console"
      exit "$code"
    fi
    say "a process died (exit code $code): starting again from the newest checkpoint ($died of ${MEGARL_RESTARTS:-3})"
    # The old port may not be free yet.
    MASTER_PORT=$((20000 + (MASTER_PORT - 20000 + 1) % 10000))
    build_step
  done
}

requeue() {
  if [[ ${MEGARL_REQUEUE:-auto} == never ]]; then
    say "not requeued, as MEGARL_REQUEUE=never says; the same command with the same run folder goes on"
    exit 75
  fi
  if ! scontrol requeue "$job"; then
    say "SLURM does not requeue this job: submit it again with the same run folder, or use launchers/chain.sh"
    exit 75
  fi
  sleep 300 # SLURM ends this script
}

say() { echo "[$(date +%H:%M:%S)] $*"; }

stop() {
  echo "error: $*" >&2
  exit 2
}
