#!/usr/bin/env bash
# Qwen2.5-7B on MATH with RAPO, as a SLURM job.
#
#   bash THIS_FILE --dry-run    checks everything and prints the plan
#   bash THIS_FILE              checks, then submits itself with sbatch
#
# Trainer ranks take the job's first TRAINER_NODES, engines the others (or, with ENGINE_NODES=0, further GPUs of the
# same nodes). Before its time is up the trainer saves and the job requeues itself, and SLURM requeues it after
# preemption or the loss of a node; either way it goes on from its newest checkpoint. All nodes must see RUN_DIRECTORY and MODEL. Relative
# paths start where it is submitted. docs/slurm.md says more.

# ── Settings ──────────────────────────────────────────────────────────────────────────────────────────────────────
SBATCH_ARGUMENTS=(--job-name=qwen2.5-7b --time=24:00:00) # also --partition, --account, --qos, …
CONFIGS=(examples/configs/qwen2.5-7b.toml)       # later files overlay earlier ones
SETTINGS=()                                      # single options over them: run.steps=200
MODEL=/models/Qwen2.5-7B
RUN_DIRECTORY=runs/qwen2.5-7b
REQUEUE_BEFORE_S=120                             # seconds before --time is up
RELAUNCHES=0                                     # of the trainer after it hung

TRAINER_NODES=2
RANKS_PER_NODE=8                                 # times TRAINER_NODES: the ranks of [parallel]
GPUS_PER_NODE=8                                  # 0: all compute on CPUs
ENGINE_NODES=2                                   # 0: engines run on the trainer's nodes
ENGINE_PORTS=(30000 30001 30002 30003)           # of each node with engines: one engine a port
GPUS_PER_ENGINE=2
MASTER_PORT=29500                                # of the trainer's rendezvous

RAPO=(.venv/bin/megatron-rapo)
ENGINE=sglang                                    # embedded or sglang or vllm
ENGINE_PYTHON=/opt/sglang/bin/python             # of the environment that engines run in
ENGINE_ARGUMENTS=(--dtype bfloat16)
SRUN_ARGUMENTS=()                                # of each step, such as --container-image=…
ENVIRONMENT=(OMP_NUM_THREADS=1 CUDA_DEVICE_MAX_CONNECTIONS=1 HF_HUB_OFFLINE=1) # NCCL's, too
# ──────────────────────────────────────────────────────────────────────────────────────────────────────────────────

set -euo pipefail
LOGS=$RUN_DIRECTORY/slurm
REQUEUE_S=20 # of REQUEUE_BEFORE_S, for the requeue itself
QUICK_S=30 # an engine that ends sooner after its start could not be started
NODES=$((TRAINER_NODES + ENGINE_NODES))

fail() {
    echo "error: $*" >&2
    exit 1
}

join() { # join SEPARATOR WORD…
    local IFS=$1
    shift
    echo "$*"
}

toml_urls() { # toml_urls HOST…: the addresses of the engines on these hosts
    local host port urls=()
    for host in "$@"; do
        for port in "${ENGINE_PORTS[@]}"; do
            urls+=("\"http://$host:$port\"")
        done
    done
    echo "[$(join , "${urls[@]}")]"
}

time_limit() { # the last --time of SBATCH_ARGUMENTS, as a setting; nothing where there is none
    local argument found=
    for argument in "${SBATCH_ARGUMENTS[@]}"; do
        [[ $argument != --time=* ]] || found=${argument#--time=}
    done
    [[ -z $found ]] || echo "slurm.time_limit=\"$found\""
}

# The settings above as the configuration's last overlay, so that megatron-rapo checks them with all the rest.
mapfile -t TIME_LIMIT < <(time_limit)
OVERLAY=(
    "${TIME_LIMIT[@]}"
    "model.path=$MODEL"
    "run.directory=$RUN_DIRECTORY"
    "rollout.engine.kind=$ENGINE"
    "slurm.trainer_nodes=$TRAINER_NODES"
    "slurm.ranks_per_node=$RANKS_PER_NODE"
    "slurm.gpus_per_node=$GPUS_PER_NODE"
    "slurm.engine_nodes=$ENGINE_NODES"
    "slurm.engine_ports=[$(join , "${ENGINE_PORTS[@]}")]"
    "slurm.gpus_per_engine=$( ((GPUS_PER_NODE)) && echo "$GPUS_PER_ENGINE" || echo @default)"
    "slurm.master_port=$MASTER_PORT"
    "slurm.requeue_before_s=$REQUEUE_BEFORE_S"
    "run.relaunches=$RELAUNCHES"
    "${SETTINGS[@]}"
)

# ── Outside a job: check, then submit ─────────────────────────────────────────────────────────────────────────────

submit() {
    local hosts job=(
        --nodes="$NODES" --exclusive --requeue --open-mode=append --signal=B:USR1@"$REQUEUE_BEFORE_S"
        --output="$LOGS/job-%j.log"
    )
    ((GPUS_PER_NODE == 0)) || job+=(--gpus-per-node="$GPUS_PER_NODE")
    job+=("${SBATCH_ARGUMENTS[@]}" "$0")

    mapfile -t hosts < <(seq -f "engine-node-%g" $((ENGINE_NODES > 0 ? ENGINE_NODES : TRAINER_NODES)))
    "${RAPO[@]}" train "${CONFIGS[@]}" --dry-run --set "${OVERLAY[@]}" "rollout.engine.urls=$(toml_urls "${hosts[@]}")"
    mkdir -p "$LOGS" 2>/dev/null && [[ -w $LOGS ]] ||
        fail "RUN_DIRECTORY=$RUN_DIRECTORY takes no files; choose another place"
    if command -v sbatch >/dev/null; then
        sbatch --test-only "${job[@]}" ||
            fail "SLURM refuses the job, for the reason above; change SBATCH_ARGUMENTS or the number of nodes"
    elif [[ ${1:-} == --dry-run ]]; then
        echo "sbatch is not on this machine, so SLURM was not asked"
    else
        fail "sbatch is not on this machine; submit from one of the cluster's login nodes"
    fi
    [[ ${1:-} == --dry-run ]] || RAPO_SUBMITTED=1 sbatch "${job[@]}"
}

if [[ -z ${SLURM_JOB_ID:-} ]]; then
    [[ $# -eq 0 || $* == --dry-run ]] || fail "unknown arguments: $*; write bash $0, or bash $0 --dry-run"
    submit "$@"
    exit
fi

# ── In the job, on its first node ─────────────────────────────────────────────────────────────────────────────────

[[ -n ${RAPO_SUBMITTED:-} ]] ||
    fail "this job was not checked and has SLURM's defaults; submit it as bash FILE, which calls sbatch"

address() { # address NODE: where other nodes reach it
    scontrol show node "$1" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

newest_checkpoint() {
    local steps=("$RUN_DIRECTORY"/checkpoints/step_*)
    echo "${steps[-1]}"
}

on_time_up() { # the trainer ends its step and saves; where that takes too long, its newest checkpoint must do
    local left=$((REQUEUE_BEFORE_S > 2 * REQUEUE_S ? REQUEUE_BEFORE_S - REQUEUE_S : REQUEUE_BEFORE_S / 2))
    echo "time is nearly up: the trainer is to save after its step, within $left s"
    kill -USR1 "$TRAINER" 2>/dev/null || true # srun hands it on to all ranks
    for (( ; left > 0; left--)); do
        kill -0 "$TRAINER" 2>/dev/null || break
        sleep 1
    done
    if ! kill -0 "$TRAINER" 2>/dev/null && wait "$TRAINER"; then
        exit 0 # it was its last step
    fi
    [[ $(newest_checkpoint) != "$FIRST_CHECKPOINT" ]] ||
        fail "no checkpoint was written within the time limit, so that to go on would lead nowhere;" \
            "raise --time or REQUEUE_BEFORE_S, or lower checkpoint.every"
    echo "time is nearly up: requeued, to go on from $(newest_checkpoint)"
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}

on_exit() {
    ((${#WATCHERS[@]} == 0)) || kill "${WATCHERS[@]}" 2>/dev/null || true # SLURM ends the steps with the job
}

start_engine() { # start_engine NODE NUMBER: in the background; one that ends is started again
    local node=$1 port=${ENGINE_PORTS[$2]} host gpus="" log command
    host=$(address "$node")
    log=$LOGS/engine-$node-$port.log
    # shellcheck disable=SC2153 # not ENGINES
    case $ENGINE in
    embedded)
        command=("$ENGINE_PYTHON" -m megatron_rapo.embedded_server --model "$MODEL")
        ((GPUS_PER_NODE == 0)) || command+=(--device cuda)
        ;;
    sglang)
        command=(
            "$ENGINE_PYTHON" -m sglang.launch_server --model-path "$MODEL" --tp-size "$GPUS_PER_ENGINE"
            --api-key "$RAPO_ENGINE_API_KEY"
        )
        ;;
    vllm)
        mapfile -t command < <("${RAPO[@]}" engine vllm --python "$ENGINE_PYTHON")
        command+=(--model "$MODEL")
        ((GPUS_PER_NODE == 0)) || command+=(--tensor-parallel-size "$GPUS_PER_ENGINE")
        ;;
    esac
    if ((GPUS_PER_NODE)); then
        local first=$(((ENGINE_NODES > 0 ? 0 : RANKS_PER_NODE) + $2 * GPUS_PER_ENGINE))
        gpus=$(seq -s, "$first" $((first + GPUS_PER_ENGINE - 1)))
    fi
    command+=(--host "$host" --port "$port" "${ENGINE_ARGUMENTS[@]}")
    (
        for ((starts = 1; ; starts++)); do
            SECONDS=0
            CUDA_VISIBLE_DEVICES=$gpus srun "${STEP[@]}" --nodes=1 --ntasks=1 --nodelist="$node" \
                --output="$log" "${command[@]}" || true
            ((SECONDS >= QUICK_S)) || break
            echo "the engine on $node, port $port, ended and is started again; its log is $log"
        done
        # One that cannot be started at all ends the job; of others the trainer knows whether it can do without.
        echo "error: the engine on $node, port $port, ended ${SECONDS} s after its start; its log is $log" >&2
        ((starts > 1)) || kill -USR2 $$
    ) &
    WATCHERS+=($!)
}

WATCHERS=()
FIRST_CHECKPOINT=$(newest_checkpoint)
trap on_exit EXIT
trap 'exit 143' TERM
trap on_time_up USR1
trap 'exit 1' USR2

export "${ENVIRONMENT[@]}"
# Who reaches an engine can replace its model: the key is this job's alone.
RAPO_ENGINE_API_KEY=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export RAPO_ENGINE_API_KEY
STEP=(--overlap --cpu-bind=none --open-mode=append --kill-on-bad-exit=1 "${SRUN_ARGUMENTS[@]}")

mapfile -t HOSTS < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
TRAINERS=("${HOSTS[@]:0:TRAINER_NODES}")
ENGINES=("${HOSTS[@]:TRAINER_NODES}")
((ENGINE_NODES > 0)) || ENGINES=("${TRAINERS[@]}")
MASTER_ADDR=$(address "${TRAINERS[0]}")
export MASTER_ADDR MASTER_PORT
echo "job $SLURM_JOB_ID, start $((${SLURM_RESTART_COUNT:-0} + 1)): trainer on ${TRAINERS[*]}, engines on ${ENGINES[*]}"

addresses=()
for node in "${ENGINES[@]}"; do
    addresses+=("$(address "$node")")
    for number in "${!ENGINE_PORTS[@]}"; do
        start_engine "$node" "$number"
    done
done

train() {
    srun "${STEP[@]}" --nodes="$TRAINER_NODES" --ntasks=$((TRAINER_NODES * RANKS_PER_NODE)) \
        --ntasks-per-node="$RANKS_PER_NODE" --distribution=block --nodelist="$(join , "${TRAINERS[@]}")" \
        "${RAPO[@]}" train "${CONFIGS[@]}" --set "${OVERLAY[@]}" "rollout.engine.urls=$(toml_urls "${addresses[@]}")" &
    TRAINER=$!
    wait "$TRAINER" # here, where a signal interrupts it
}

hangs() { # reports of hangs so far
    local reports=("$RUN_DIRECTORY"/hangs/*/report.txt)
    [[ -e ${reports[0]} ]] || reports=()
    echo "${#reports[@]}"
}

for ((restarts = 0; ; restarts++)); do
    HANGS=$(hangs)
    train && exit
    status=$?
    ((restarts < RELAUNCHES && $(hangs) > HANGS)) || exit "$status"
    echo "the trainer is started again, $((restarts + 1)) of $RELAUNCHES times"
done
