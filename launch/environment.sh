# Turns KDAD_* variables into what `accelerate launch` needs. Sourced by train.sh and score.sh.
# shellcheck shell=bash
#
#   KDAD_MODE       cpu, gpu (one process) or multi_gpu; default: cpu
#   KDAD_PROCESSES  processes on each machine; default: 1 (multi_gpu: must be given)
#   KDAD_MACHINES, KDAD_MACHINE_RANK, KDAD_MAIN_ADDRESS, KDAD_MAIN_PORT
#                   for several machines: how many, which one this is, where machine 0 answers
#   KDAD_PYTHON     the Python to run; default: python

mode=${KDAD_MODE:-cpu}
machines=${KDAD_MACHINES:-1}
case $mode in
    cpu) export ACCELERATE_USE_CPU=true ;;
    gpu) KDAD_PROCESSES=1 ;;
    multi_gpu) : "${KDAD_PROCESSES:?set it to the number of GPUs on each machine}" ;;
    *) echo "KDAD_MODE is '$mode'; known are cpu, gpu, multi_gpu" >&2; exit 2 ;;
esac

# The program compares this with the processes that really came up, and refuses a difference.
export KDAD_WORLD_SIZE=$((${KDAD_PROCESSES:-1} * machines))
# Without this, DDP warns at every start of a setting that is chosen on purpose (session.py).
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Threads of a process; more than one only pays where a process has cores of its own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

launcher=(
    "${KDAD_PYTHON:-python}" -m kdad_dist.runtime.launcher
    --config_file "$(dirname "${BASH_SOURCE[0]}")/accelerate/$mode.yaml"
    --num_processes "$KDAD_WORLD_SIZE" --num_machines "$machines"
)
if [[ $machines -eq 1 ]]; then
    launcher+=(--main_process_port 0)  # any free port: several runs may share a machine
else
    launcher+=(
        --machine_rank "${KDAD_MACHINE_RANK:?set it to this machine, counted from 0}"
        --main_process_ip "${KDAD_MAIN_ADDRESS:?set it to the address of machine 0}"
        --main_process_port "${KDAD_MAIN_PORT:-29500}"
    )
fi
