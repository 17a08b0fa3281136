#!/bin/bash
# A real slurm on this machine: slurmctld and two slurmd that call themselves n1 and n2, all below one folder.
#
#   bash tests/slurm_cluster.sh start FOLDER    then SLURM_CONF=FOLDER/slurm.conf for sbatch, squeue, ...
#   bash tests/slurm_cluster.sh stop FOLDER
#
# Needs root. Installs slurm-wlm and munge by apt-get where they are missing. Exit code 3, with a line that says why,
# where this machine cannot have it.
set -euo pipefail

cannot() {
    echo "slurm: $1" >&2
    exit 3
}

install() {
    command -v slurmctld slurmd munged sbatch >/dev/null && return
    command -v apt-get >/dev/null || cannot "not installed, and there is no apt-get"
    local log=$folder/apt.log
    export DEBIAN_FRONTEND=noninteractive
    for _ in 1 2 3; do # another apt-get may hold the lock
        if { apt-get update -qq &&
            timeout 300 apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=60 slurm-wlm munge; } >>"$log" 2>&1; then
            return
        fi
        sleep 5
    done
    cannot "not installed, and apt-get could not: $(tail -n 1 "$log")"
}

configure() {
    local ports=$1 host
    host=$(hostname -s)
    cat >"$folder/slurm.conf" <<END
ClusterName=two
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$ports
SlurmUser=root
AuthType=auth/munge
# A requeued job waits as long as its old credential lives, 120 s by default.
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
ReturnToService=2
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1,sched_min_interval=0,batch_sched_delay=0
KillWait=5
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool.%n
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.%n.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.%n.log
NodeName=n[1-2] NodeHostname=$host NodeAddr=127.0.0.1 Port=[$((ports + 1))-$((ports + 2))] CPUs=2 RealMemory=1000
PartitionName=all Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
END
}

start() {
    [[ $(id -u) == 0 ]] || cannot "slurmctld and slurmd need root"
    mkdir -p "$folder/state"
    install
    configure "$((20000 + RANDOM % 10000))"
    # munged wants a folder that nobody else may write to, and its own user where it does not run as root
    [[ -f $folder/munge.key ]] || (umask 077 && head -c 128 /dev/urandom >"$folder/munge.key")
    munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
        --log-file="$folder/munged.log" --seed-file="$folder/munged.seed"
    export SLURM_CONF=$folder/slurm.conf
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
    for _ in {1..100}; do
        [[ $(sinfo --noheader --states=idle --format=%D 2>/dev/null) == 2 ]] && return
        sleep 0.1
    done
    stop
    cannot "the nodes did not come up; see the logs in $folder"
}

stop() {
    local file pid pids=()
    export SLURM_CONF=$folder/slurm.conf
    scancel --full --signal=KILL --state=running >/dev/null 2>&1 || true
    for file in "$folder"/slurmd.n?.pid "$folder/slurmctld.pid" "$folder/munged.pid"; do
        [[ ! -f $file ]] || pids+=("$(<"$file")")
    done
    for pid in "${pids[@]}"; do
        kill "$pid" 2>/dev/null || continue
        for _ in {1..50}; do
            [[ -e /proc/$pid/exe ]] || continue 2 # gone, or a zombie that nobody waits for
            sleep 0.1
        done
        kill -KILL "$pid" 2>/dev/null || true
    done
}

[[ ${1:-} == start || ${1:-} == stop ]] && [[ -n ${2:-} ]] || cannot "usage: start|stop FOLDER"
folder=$(realpath -m "$2")
"$1"
