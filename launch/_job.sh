# Part of launch/_run.sh for the batch script of a slurm job: it stays beside the run, asks it to save and end when slurm
# is about to end the job, and puts the job back into the queue where there is more to do.

LIVES='JobState=(RUNNING |COMPLETING Reason=TimeLimit)' # as scontrol shows a job that nobody cancelled

asked=
# The first thing that a batch script does: a signal without a handler would end it. Waiting for a child is interrupted.
hear_slurm() {
    trap 'asked=1; [[ -z ${folder:-} ]] || ask_to_stop' USR1 TERM
}

# In slurm's name, so that the ranks answer "yes" to going on; a person's file stays. Whole at once: the ranks may look.
ask_to_stop() {
    { echo slurm >"$folder/stop.partial" && mv -n "$folder/stop.partial" "$folder/stop"; } || true
    rm -f "$folder/stop.partial"
}

is_number() { # 0 or a number without leading zeros, which bash would read as octal
    [[ $1 =~ ^(0|[1-9][0-9]{0,17})$ ]]
}

# ask_slurm ARGUMENT ...: what scontrol answers; asked again where it does not, as while slurmctld starts anew
ask_slurm() {
    local pause answer
    for pause in 1 2 4 0; do
        if answer=$(scontrol "$@"); then
            [[ -z $answer ]] || echo "$answer"
            return
        fi
        sleep "$pause"
    done
    return 1
}

# run_job PYTHON FILE [section.key=value ...] < the resolved recipe; does not return
run_job() {
    local python=$1 file=$2 limit hosts first address
    shift 2
    # Ended by NUL, which no path has. What is no number does not enter arithmetic, which would run commands in it.
    { read -r -d "" folder && read -r -d "" limit; } < <("$python" -c '
import sys, tomllib
run = tomllib.load(sys.stdin.buffer)["run"]
print(run["dir"], int(run["max_requeues"]), "", sep="\0", end="")')
    is_number "$limit" || fail "run.max_requeues: cannot be read from the recipe; correct it."
    is_number "$SLURM_JOB_ID" || fail "SLURM_JOB_ID=$SLURM_JOB_ID: not a number; submit with sbatch."
    mkdir -p "$folder/logs"
    rm -f "$folder/stop" "$folder/requeue" # of an earlier attempt
    [[ -z $asked ]] || ask_to_stop

    # By the address that slurm itself uses: a node's name need not resolve. No pipes: one dies of a SIGPIPE or a failure.
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
    first=${hosts%%[[:space:]]*}
    address=$first
    [[ ! $(ask_slurm show node "$first" || true) =~ NodeAddr=([^[:space:]]+) ]] || address=${BASH_REMATCH[1]}
    export FASTGRPO_MASTER=$address:$((20000 + SLURM_JOB_ID % 10000)) FASTGRPO_BATCH=1
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
    is_number "$code" || code=1
    rm -f "$ended"
    conclude "$code" "$limit"
}

# conclude EXIT_CODE LIMIT: what becomes of the job; does not return
conclude() {
    local code=$1 limit=$2 answer=none newest=none before=none ended=0 how state
    trap '' USR1 TERM
    [[ ! -f $folder/requeue ]] || answer=$(<"$folder/requeue")
    if [[ ${ENVIRONMENT:-} != BATCH || $answer == no || ($code == 0 && $answer == none) ]]; then
        rm -f "$folder/attempts"
        exit "$code"
    fi
    # A job that slurm is ending by now was cancelled, or slurm itself puts it back, unless its time was up. Where slurm
    # does not say, the job is put back: what was not cancelled must not be lost.
    if state=$(ask_slurm show job "$SLURM_JOB_ID") && [[ ! $state =~ $LIVES ]]; then
        echo "job $SLURM_JOB_ID: cancelled; submitting it again goes on with what $folder holds" >&2
        exit "$code"
    fi
    how="crashed (exit code $code)"
    [[ $answer == none ]] || how="stopped in good order"
    # How many attempts in a row have ended with this checkpoint as the newest: a job must not go round for ever.
    # The run's folder may be others' to write: what is neither a checkpoint's name nor a number is not used.
    [[ ! -f $folder/checkpoints/latest ]] || newest=$(<"$folder/checkpoints/latest")
    [[ $newest =~ ^step-[0-9]{1,18}$ ]] || newest=none
    [[ ! -f $folder/attempts ]] || read -r before ended <"$folder/attempts" || true
    [[ $before == "$newest" ]] && is_number "$ended" || ended=0
    if ((ended >= limit)); then
        rm -f "$folder/attempts"
        fail "run.max_requeues=$limit: attempt $((ended + 1)) that ends at checkpoint $newest, $how; look at $FASTGRPO_LOGS."
    fi
    echo "$newest $((ended + 1))" >"$folder/attempts"
    echo "job $SLURM_JOB_ID: $how, newest checkpoint $newest; back into the queue" >&2
    if ! ask_slurm requeue "$SLURM_JOB_ID"; then
        echo "job $SLURM_JOB_ID: slurm did not take it back; submitting it again goes on with what $folder holds" >&2
        exit $((code == 0 ? 1 : code))
    fi
    exit "$code"
}
