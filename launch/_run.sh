#!/bin/bash
# Start one recipe with torchrun, here or on every node of a slurm job. The bash half of each launch file ends here.
#
#   bash launch/_run.sh LAUNCH_FILE [section.key=value ...]
#
# FASTGRPO_PROCESSES  processes per node; default: one per GPU, and without a GPU two (one on a single core)
# OMP_NUM_THREADS     threads per process; default: the node's cores shared out, at most 8
# FASTGRPO_SETTLED    set here and by fastgrpo/launch.py: recipe checked, number of processes settled
# FASTGRPO_MASTER     set here for the nodes of a slurm job: host:port where they meet
set -euo pipefail

fail() { # where=value, what is wrong and what to do; the exit code of a user's mistake
    echo "fastgrpo: $1" >&2
    exit 2
}

gpus() {
    local visible=${CUDA_VISIBLE_DEVICES-unset} listed
    listed=$(nvidia-smi --list-gpus 2>/dev/null | grep -c "^GPU") || listed=0
    case $visible in
        unset) echo "$listed" ;;
        "" | -1) echo 0 ;;
        *) visible=${visible//[^,]/}; echo $((listed == 0 ? 0 : ${#visible} + 1)) ;;
    esac
}

file=$(realpath "$1")
shift
root=$(dirname "$(dirname "$file")")
recipe=${file%.sh}.toml

python=$root/.venv/bin/python
[[ -x $python ]] || python=$(command -v python3 || command -v python) ||
    fail "PATH: no python3; run 'make venv' in $root."

# Under torchrun --no-python every rank comes through here: each goes straight to the Python half.
[[ -z ${TORCHELASTIC_RUN_ID:-} ]] || exec "$python" "$file" "$@"

cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
processes=${FASTGRPO_PROCESSES-$(gpus)}
[[ -n ${FASTGRPO_PROCESSES+set} || $processes != 0 ]] || processes=$((cores >= 2 ? 2 : 1))
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
    fail "FASTGRPO_PROCESSES=$processes: not a number of processes; use 1 or more, such as 8."
threads=$((cores / processes))
threads=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))
nodes=${SLURM_NNODES:-1}

if [[ -z ${FASTGRPO_MASTER:-} ]]; then
    "$python" -c "import importlib.util as i, sys; sys.exit(i.find_spec('torch') is None)" ||
        fail "python=$python: no torch there; run 'make venv' in $root, or activate the right environment."
    # torchrun turns every exit code into 1 and buries the message: tell a mistake in the recipe before it starts.
    PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} "$python" -m fastgrpo.cli check "$recipe" "$@" >/dev/null

    if ((nodes > 1)); then
        hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") # not piped into head, which could kill it by SIGPIPE
        export FASTGRPO_MASTER=${hosts%%[[:space:]]*}:$((20000 + SLURM_JOB_ID % 10000))
        # One task per node with all its cores; without the last option srun gives a task one core.
        exec srun --nodes="$nodes" --ntasks="$nodes" --ntasks-per-node=1 --cpus-per-task="${SLURM_JOB_CPUS_PER_NODE%%[(,]*}" \
            --kill-on-bad-exit=1 bash "${BASH_SOURCE[0]}" "$file" "$@"
    fi
    meeting=(--standalone)
else
    meeting=(--nnodes="$nodes" --node-rank="$SLURM_NODEID")
    meeting+=(--master-addr="${FASTGRPO_MASTER%:*}" --master-port="${FASTGRPO_MASTER##*:}")
fi

trap "" USR1 # slurm's warning before the time limit would kill torchrun; a resubmitted job resumes
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} FASTGRPO_SETTLED=1
exec "$python" -m torch.distributed.run "${meeting[@]}" --nproc-per-node="$processes" "$file" "$@"
