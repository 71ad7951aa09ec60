# What the jobs in slurm/ share. It turns SLURM's variables into those of environment.sh, stops a run in
# order when the job's time is nearly up, and puts the job back into the queue. Sourced by slurm/*.sbatch.
# shellcheck shell=bash

export KDAD_PYTHON=${KDAD_PYTHON:-python}
export KDAD_MODE=${KDAD_MODE:-multi_gpu}
export KDAD_PROCESSES=${KDAD_PROCESSES:-${SLURM_GPUS_ON_NODE:-1}}
export KDAD_MACHINES=$SLURM_NNODES
export KDAD_MAIN_ADDRESS=${KDAD_MAIN_ADDRESS:-$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)}
# Free on this node, which is the first: other jobs, and tasks of this array, may share it.
KDAD_MAIN_PORT=$("$KDAD_PYTHON" -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
export KDAD_MAIN_PORT
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}  # srun does not take it over since 22.05
kdad_launch=$(dirname "${BASH_SOURCE[0]}")

# The signal reaches this shell only: were it sent to the job, it might kill the launcher first.
asked=
trap 'asked=yes' USR1

# run_directory WORDS...: of a run, from what follows `kdad train` or `kdad score`.
run_directory() { "$KDAD_PYTHON" -m kdad_dist.runtime.launcher --run-directory "$@"; }

# on_every_node RUN SCRIPT WORDS...: starts a launch script on each node, and returns when all are done.
# A run that was stopped goes back into the queue, and one that failed ends the job.
on_every_node() {
    local run=$1 script=$2 step code=0
    [[ -z $asked ]] || requeue
    echo "== $script ${*:3}"  # tells in a log where a command begins
    # The first node to leave with 75 must not take the others down; one that fails does, a minute later.
    # shellcheck disable=SC2016  # each node fills in its own number
    srun --kill-on-bad-exit=0 --wait=60 bash -c 'KDAD_MACHINE_RANK=$SLURM_NODEID exec "$0" "$@"' \
        "$kdad_launch/$script" "${@:3}" &
    step=$!
    trap 'asked=yes; keep_asking "$step" "$run"' USR1
    while kill -0 "$step" 2>/dev/null; do
        wait "$step" || true  # a trapped signal ends `wait`, not the step
    done
    wait "$step" || code=$?
    trap 'asked=yes' USR1
    [[ $code -ne 75 ]] || requeue
    [[ $code -eq 0 ]] || exit "$code"
}

# Asks until the step ends: a command that is just starting takes the file for an old one.
keep_asking() {
    while kill -0 "$1" 2>/dev/null; do
        if [[ -d $2 ]]; then touch -- "$2/PREEMPT"; fi
        sleep 2
    done
}

requeue() {
    local job=$SLURM_JOB_ID
    if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi
    scontrol requeue "$job"
    exit 75
}
