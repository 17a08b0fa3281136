#!/bin/bash
# Start one recipe with torchrun, here or on every node of a slurm job. The bash half of each launch file ends here.
#
#   bash launch/_run.sh LAUNCH_FILE [section.key=value ...]
#
# The launch file and its recipe may lie in any folder; this file lies in a checkout or where fastgrpo is installed.
#
# FASTGRPO_PYTHON     the python that has fastgrpo; default: the checkout's .venv, else python3
# FASTGRPO_PROCESSES  processes per node; default: one per GPU, and without a GPU two (one on a single core)
# OMP_NUM_THREADS     threads per process; default: the node's cores shared out, at most 8
# FASTGRPO_SETTLED    set here and by fastgrpo/core/processes.py: recipe checked, number of processes settled
# FASTGRPO_MASTER, FASTGRPO_LOGS, FASTGRPO_BATCH
#                     set by _job.sh for the nodes of a slurm job: host:port where they meet, folder for the ranks'
#                     output, and that the files of an earlier attempt are gone
set -euo pipefail
source "${BASH_SOURCE[0]%/*}/_job.sh"
trap "" USR1 # would kill torchrun; its ranks listen for it by themselves
job=             # not empty: this is to start every node of a slurm job
if [[ -z ${FASTGRPO_MASTER:-} && -n ${SLURM_JOB_ID:-} && (${ENVIRONMENT:-} == BATCH || $SLURM_NNODES != 1) ]]; then
    job=1
    hear_slurm
fi

fail() { # where=value, what is wrong and what to do; the exit code of a user's mistake
    echo "fastgrpo: $1" >&2
    exit 2
}

gpus() { # as torch counts them: a container may lack nvidia-smi, and CUDA_VISIBLE_DEVICES may hold UUIDs or MIG parts
    "$python" -c "import torch; print(torch.cuda.device_count())" 2>/dev/null || echo 0
}

file=$(realpath "$1")
shift
root=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")") # of a checkout
recipe=${file%.sh}.toml

python=$(command -v "${FASTGRPO_PYTHON:-$root/.venv/bin/python}" || command -v python3 || command -v python) ||
    fail "PATH: no python3; run 'make venv' in the checkout, or activate an environment."

# Under torchrun --no-python every rank comes through here: each goes straight to the Python half.
[[ -z ${TORCHELASTIC_RUN_ID:-} ]] || exec "$python" "$file" "$@"

[[ ! -d $root/fastgrpo ]] || export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
cores=$(env -u OMP_NUM_THREADS nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)
processes=${FASTGRPO_PROCESSES-$(gpus)}
[[ -n ${FASTGRPO_PROCESSES+set} || $processes != 0 ]] || processes=$((cores >= 2 ? 2 : 1))
[[ $processes =~ ^[1-9][0-9]*$ ]] ||
    fail "FASTGRPO_PROCESSES=$processes: not a number of processes; use 1 or more, such as 8."
threads=$((cores / processes))
threads=$((threads < 1 ? 1 : threads > 8 ? 8 : threads))

if [[ -z ${FASTGRPO_MASTER:-} ]]; then
    "$python" -c "import importlib.util as i, sys; sys.exit(i.find_spec('torch') is None)" ||
        fail "python=$python: no torch there; run 'make venv' in the checkout, or activate the right environment."
    # A mistake in the recipe is told before processes start.
    resolved=$("$python" -m fastgrpo.cli check "$recipe" "$@")
    [[ -z $job ]] || run_job "$python" "$file" "$@" <<<"$resolved"
    meeting=(--standalone --local-addr=127.0.0.1) # this machine's name need not resolve
else
    meeting=(--nnodes="$SLURM_NNODES" --node-rank="$SLURM_NODEID")
    meeting+=(--master-addr="${FASTGRPO_MASTER%:*}" --master-port="${FASTGRPO_MASTER##*:}")
    mkdir -p "$FASTGRPO_LOGS/$SLURMD_NODENAME"
    meeting+=(--log-dir="$FASTGRPO_LOGS/$SLURMD_NODENAME" --tee=3) # a file per rank, and the job's log
    export TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE='[${rank}] '
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$threads} FASTGRPO_SETTLED=1
# torchrun, which passes exit codes on
exec "$python" -m fastgrpo.cli.launch "${meeting[@]}" --nproc-per-node="$processes" "$file" "$@"
