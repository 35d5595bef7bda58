#!/usr/bin/env bash
# Rehearses a tier on the CPU, in minutes: every stage that its script declares, with small numbers.
#
#     bash dev/rehearse.sh [speedrun | run1000 | single | laptop | pocket | runcpu] [--mirror=PATH] [--stages=N]
#
# The multi-GPU tiers run with 8 processes (PROCESSES=2 for fewer). Data come from a local server: of --mirror, a folder
# laid out like the public hosts, else of generated files of the same schemas. Each training stage is killed (kill -9)
# after its first checkpoint, and continues. --stages: the first N only. All outputs are in REHEARSAL_DIR (a new temporary
# folder, kept if it fails).

set -euo pipefail
tier=speedrun mirror="" stages=""
for argument; do
    case $argument in
    speedrun | run1000 | single | laptop | pocket | runcpu) tier=$argument ;;
    --mirror=*)
        mirror=${argument#--mirror=}
        [[ -d $mirror ]] || { echo "error: no folder $mirror" >&2 && exit 2; }
        mirror=$(cd "$mirror" && pwd)
        ;;
    --stages=[1-9]*) stages=${argument#--stages=} ;;
    *) echo "error: unknown argument $argument, see the top of $0" >&2 && exit 2 ;;
    esac
done
set --
processes=${PROCESSES:-8} started=$SECONDS

# The overrides: flags that are appended to the command of a module.
width=256 rows=1
batch=$((processes * rows * width))
size="--max_seq_len=$width --device_batch_size=$rows --compile=0 --save_every=2"
declare -A OVERRIDES=(
    [nanochat.dataset]="-n 2"
    [scripts.tok_train]="--max_chars=1000000 --vocab_size=1024"
    [scripts.base_train]="--depth=2 $size --total_batch_size=$batch --num_iterations=6 --eval_every=3 --eval_tokens=$batch
        --core_metric_max_per_task=4"
    [scripts.base_loss]="--device_batch_size=$rows --split_tokens=$batch"
    [scripts.base_eval]="--max_per_task=4"
    [scripts.mid_train]="$size --total_batch_size=$batch --num_iterations=6 --eval_tokens=$batch"
    [scripts.chat_sft]="--device_batch_size=$rows --compile=0 --save_every=2 --target_examples_per_step=$((2 * processes))
        --num_iterations=6 --eval_steps=4 --eval_metrics_max_problems=4"
    [scripts.chat_rl]="--compile=0 --save_every=1 --num_iterations=3 --examples_per_step=4 --num_samples=2
        --max_new_tokens=8 --eval_examples=4"
    [scripts.chat_eval]="--max_problems=4 --max_new_tokens=8"
)

work=${REHEARSAL_DIR:-$(mktemp -d)}
mkdir -p "$work"
work=$(cd "$work" && pwd)
export NANOCHAT_BASE_DIR=$work/base CUDA_VISIBLE_DEVICES="" NPROC_PER_NODE=$processes HF_HOME=$work/huggingface
unset WANDB_RUN TIER
cd "$(dirname "${BASH_SOURCE[0]}")/.."
declares=speedrun.sh
[[ $tier != runcpu ]] || declares=dev/runcpu.sh
. "./$declares"
[[ $tier == runcpu ]] || $tier
set_up

if [[ $tier != pocket ]]; then
    if [[ -z $mirror ]]; then
        mirror=$work/mirror
        python -m dev.make_mirror "$mirror"
    fi
    python -m http.server --bind 127.0.0.1 --directory "$mirror" 0 >"$work/server.log" 2>&1 &
    server=$!
    trap 'kill $server $(jobs -p) 2>/dev/null || true' EXIT
    until port=$(grep -os 'port [0-9]*' "$work/server.log"); do sleep 0.1; done
    export NANOCHAT_HUB_URL=http://127.0.0.1:${port#port } NANOCHAT_GITHUB_URL=http://127.0.0.1:${port#port }
    export NANOCHAT_BUCKET_URL=http://127.0.0.1:${port#port }/karpathy-public
fi

# killed_once <checkpoint folder> <command...>: kills the command after its first checkpoint, then runs it to its end.
killed_once() {
    local folder=$NANOCHAT_BASE_DIR/$1 pid
    shift
    setsid "$@" &
    pid=$!
    until compgen -G "$folder/step_*[0-9]" >/dev/null; do
        kill -0 $pid 2>/dev/null || { wait $pid && die "$1 has ended before it could be killed"; return 1; }
        sleep 0.1
    done
    pkill -9 --session "$pid"
    wait $pid || true
    echo "rehearsal: killed after the first checkpoint; the same command again"
    "$@"
}

kills=0
if [[ -n $stages ]]; then
    TITLES=("${TITLES[@]:0:stages}") COMMANDS=("${COMMANDS[@]:0:stages}")
fi
for i in "${!COMMANDS[@]}"; do
    for module in "${!OVERRIDES[@]}"; do
        [[ ${COMMANDS[i]} == *"-m $module "* ]] || continue
        flags=${OVERRIDES[$module]}
        [[ $module != scripts.base_train ]] || flags+=" --model_tag=${OUTPUTS[i]#*/}"
        [[ ${COMMANDS[i]} != *--pocket* ]] || flags="--chars=300000"
        flags=${flags//$'\n'/ }
        echo "rehearsal: ${TITLES[i]}: $flags"
        COMMANDS[i]+=" $flags"
    done
    COMMANDS[i]=$(sed 's/^downloading [0-9]*/downloading 2/' <<<"${COMMANDS[i]}")
    if [[ ${COMMANDS[i]} == *--resume=1* ]]; then
        COMMANDS[i]="killed_once ${OUTPUTS[i]} ${COMMANDS[i]}" kills=$((kills + 1))
    fi
done
run_stages
[[ -n $stages ]] || ! grep "^Not run" "$NANOCHAT_BASE_DIR/report/report.md"
echo "rehearsal of $tier: ${#COMMANDS[@]} stages passed, $kills of them killed and continued, in" \
    "$(duration $((SECONDS - started)))"
[[ -n ${REHEARSAL_DIR:-} ]] || rm -rf "$work"
