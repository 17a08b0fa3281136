# Part of launch/_run.sh for the batch script of a slurm job: it stays beside the run, asks it to save and end when slurm
# is about to end the job, and puts the job back into the queue where there is more to do.

asked=
# The first thing that a batch script does: a signal without a handler would end it. Waiting for a child is interrupted.
hear_slurm() {
    trap 'asked=1; [[ -z ${folder:-} ]] || touch "$folder/stop"' USR1 TERM
}

# run_job PYTHON FILE [section.key=value ...] < the resolved recipe; does not return
run_job() {
    local python=$1 file=$2 limit hosts first address
    shift 2
    { read -r folder && read -r limit; } < <("$python" -c '
import sys, tomllib
run = tomllib.load(sys.stdin.buffer)["run"]
print(run["dir"], run["max_requeues"], sep="\n")')
    mkdir -p "$folder/logs"
    rm -f "$folder/stop" "$folder/requeue" # of an earlier attempt
    [[ -z $asked ]] || touch "$folder/stop"

    # By the address that slurm itself uses: a node's name need not resolve. Not piped into head: it could die of SIGPIPE.
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts%%[[:space:]]*}
    address=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
    export FASTGRPO_MASTER=${address:-$first}:$((20000 + SLURM_JOB_ID % 10000)) FASTGRPO_BATCH=1
    export FASTGRPO_LOGS=$folder/logs/job-$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
    # The step's exit code goes through a file: bash's `wait` loses it where a signal comes as the step ends.
    local ended=$FASTGRPO_LOGS.exit step code=137
    rm -f "$ended"
    (
        trap : USR1 TERM # slurm may send them to every process of the batch script
        code=0
        # One task per node with all its cores; without the fourth option srun gives a task one core.
        srun --nodes="$SLURM_NNODES" --ntasks="$SLURM_NNODES" --ntasks-per-node=1 \
            --cpus-per-task="${SLURM_JOB_CPUS_PER_NODE%%[(,]*}" --kill-on-bad-exit=1 \
            bash "${BASH_SOURCE[0]%/*}/_run.sh" "$file" "$@" || code=$?
        echo "$code" >"$ended"
    ) &
    step=$!
    while kill -0 "$step" 2>/dev/null; do # a signal ends `wait`, not the step
        wait "$step" || true
    done
    [[ ! -f $ended ]] || read -r code <"$ended"
    rm -f "$ended"
    conclude "$code" "$limit"
}

# conclude EXIT_CODE LIMIT: what becomes of the job; does not return
conclude() {
    local code=$1 limit=$2 answer=none newest=none before=none ended=0 how
    trap '' USR1 TERM
    [[ ! -f $folder/requeue ]] || answer=$(<"$folder/requeue")
    if [[ ${ENVIRONMENT:-} != BATCH || $answer == no || ($code == 0 && $answer == none) ]]; then
        rm -f "$folder/attempts"
        exit "$code"
    fi
    # A job that slurm is ending by now was cancelled, or slurm itself puts it back, unless its time was up.
    if ! scontrol show job "$SLURM_JOB_ID" | grep -Eq "JobState=(RUNNING |COMPLETING Reason=TimeLimit)"; then
        echo "job $SLURM_JOB_ID: cancelled; submitting it again goes on with what $folder holds" >&2
        exit "$code"
    fi
    how="crashed (exit code $code)"
    [[ $answer == none ]] || how="stopped in good order"
    # How many attempts in a row have ended with this checkpoint as the newest: a job must not go round for ever.
    [[ ! -f $folder/checkpoints/latest ]] || newest=$(<"$folder/checkpoints/latest")
    [[ ! -f $folder/attempts ]] || read -r before ended <"$folder/attempts"
    [[ $before == "$newest" ]] || ended=0
    if ((ended >= limit)); then
        rm -f "$folder/attempts"
        fail "run.max_requeues=$limit: attempt $((ended + 1)) that ends at checkpoint $newest, $how; look at $FASTGRPO_LOGS."
    fi
    echo "$newest $((ended + 1))" >"$folder/attempts"
    echo "job $SLURM_JOB_ID: $how, newest checkpoint $newest; back into the queue" >&2
    scontrol requeue "$SLURM_JOB_ID"
    exit "$code"
}
