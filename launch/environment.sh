# Turns KDAD_* variables into what `accelerate launch` needs. Sourced by train.sh and score.sh.
# shellcheck shell=bash
#
#   KDAD_MODE       cpu (default) and multi_gpu (both DDP), gpu (one process), fsdp2, zero1, zero2, zero3
#   KDAD_PROCESSES  processes on each machine; default: 1 (must be given where several GPUs train)
#   KDAD_DEVICE     cpu: fsdp2 and zero1 to zero3 on the CPU, to try them
#   KDAD_DEEPSPEED  a DeepSpeed configuration of your own, for zero1 to zero3
#   KDAD_MACHINES, KDAD_MACHINE_RANK, KDAD_MAIN_ADDRESS, KDAD_MAIN_PORT
#                   for several machines: how many, which one this is, where machine 0 answers
#   KDAD_PYTHON     the Python to run; default: python

mode=${KDAD_MODE:-cpu}
machines=${KDAD_MACHINES:-1}

refuse() { echo "$1" >&2; exit 2; }

# The end of a refusal: the mode that is the given one but for capitals, hyphens and underscores.
meant() {
    local known given
    given=$(tr -cd '[:alnum:]' <<<"$mode" | tr '[:upper:]' '[:lower:]')
    for known in cpu gpu multi_gpu fsdp2 zero1 zero2 zero3; do
        if [[ ${known//_/} == "$given" ]]; then echo "; did you mean $known?"; fi
    done
}

case $mode in
    cpu) export ACCELERATE_USE_CPU=true ;;
    gpu) KDAD_PROCESSES=1 ;;
    multi_gpu | fsdp2 | zero[123])
        [[ -n ${KDAD_PROCESSES:-} ]] || refuse "KDAD_MODE=$mode needs KDAD_PROCESSES: the GPUs of each machine" ;;
    *) refuse "KDAD_MODE is '$mode'; known are cpu, gpu, multi_gpu, fsdp2, zero1, zero2, zero3$(meant)" ;;
esac
[[ ${KDAD_PROCESSES:-1} =~ ^[1-9][0-9]*$ ]] ||
    refuse "KDAD_PROCESSES is '$KDAD_PROCESSES'; it must be a whole number, 1 or more"
[[ $machines =~ ^[1-9][0-9]*$ ]] ||
    refuse "KDAD_MACHINES is '$machines'; it must be a whole number, 1 or more"
case ${KDAD_DEVICE:-}-$mode in
    -cpu | cpu-cpu) ;;
    -*) export KDAD_DEVICE=gpu ;;  # the program refuses to train on the CPU instead
    # Not ACCELERATE_USE_CPU: with it, accelerate would train under DDP instead, without a word.
    cpu-fsdp2 | cpu-zero[123]) export CUDA_VISIBLE_DEVICES='' DS_ACCELERATOR=cpu ;;
    *) refuse "KDAD_DEVICE is '$KDAD_DEVICE', for KDAD_MODE=$mode; it may be cpu, for fsdp2 and zero1 to zero3" ;;
esac

# The program compares this with the processes that really came up, and refuses a difference.
export KDAD_WORLD_SIZE=$((${KDAD_PROCESSES:-1} * machines))
# Without this, DDP warns at every start of a setting that is chosen on purpose (session.py).
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}
# Threads of a process; more than one only pays where a process has cores of its own.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

here=$(dirname "${BASH_SOURCE[0]}")
launcher=(
    "${KDAD_PYTHON:-python}" -m kdad_dist.runtime.launcher
    --config_file "$here/accelerate/$mode.yaml"
    --num_processes "$KDAD_WORLD_SIZE" --num_machines "$machines"
)
if [[ $mode == zero? ]]; then
    launcher+=(--deepspeed_config_file "${KDAD_DEEPSPEED:-$here/deepspeed/$mode.json}")
fi
if [[ $machines -eq 1 ]]; then
    launcher+=(--main_process_port 0)  # any free port: several runs may share a machine
else
    [[ ${KDAD_MACHINE_RANK:-} =~ ^(0|[1-9][0-9]*)$ && $KDAD_MACHINE_RANK -lt $machines ]] ||
        refuse "KDAD_MACHINE_RANK is '${KDAD_MACHINE_RANK:-}'; set it to this machine's number, from 0 to $((machines - 1))"
    [[ -n ${KDAD_MAIN_ADDRESS:-} ]] ||
        refuse "KDAD_MACHINES=$machines needs KDAD_MAIN_ADDRESS: the address of machine 0"
    launcher+=(
        --machine_rank "$KDAD_MACHINE_RANK" --main_process_ip "$KDAD_MAIN_ADDRESS"
        --main_process_port "${KDAD_MAIN_PORT:-29500}"
    )
fi
