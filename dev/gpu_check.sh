#!/usr/bin/env bash
# Checks this repository on a machine with NVIDIA GPUs, in at most eight minutes, and prints one page.
#
#     bash dev/gpu_check.sh
#
# Run it first on a new machine. Uses .venv if it exists, else the Python on the PATH; OUT (a temporary folder) receives
# the outputs of all checks. Exit code 1 if a check fails.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[[ ! -d .venv ]] || . .venv/bin/activate
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
((gpus)) || { echo "error: nvidia-smi finds no GPU here" >&2 && exit 2; }
out=${OUT:-$(mktemp -d)}
mkdir -p "$out"
export NANOCHAT_BASE_DIR=$out/base NANOCHAT_BUCKET_URL=$out/mirror/karpathy-public OMP_NUM_THREADS=4 PYTHONPATH=.
processes=1 failed=0
while ((2 * processes <= gpus && processes < 8)); do processes=$((2 * processes)); done
train="--depth=4 --max_seq_len=512 --device_batch_size=4 --total_batch_size=$((8 * 4 * 512)) --eval_tokens=65536
    --num_iterations=40 --eval_every=-1 --sample_every=-1 --core_metric_every=-1 --save_every=20 --compile=1"

# check <title> <seconds> <command...>: runs the command, prints its figures or its last lines.
check() {
    local title=$1 limit=$2 started=$SECONDS log
    log="$out/$(tr -c 'a-z0-9\n' _ <<<"${title,,}").log"
    if timeout "$limit" bash -c '"$@"' check "${@:3}" >"$log" 2>&1; then
        echo "ok      $title ($((SECONDS - started)) s)"
        grep '^  ' "$log" || true # what a check wants on the page is indented
    else
        echo "FAILED  $title ($((SECONDS - started)) s), see $log"
        tail -5 "$log" | sed 's/^/        /'
        failed=1
    fi
}

launch() { python -m dev.launch --standalone --nproc_per_node="$processes" "$@"; }

data() {
    python -m nanochat.dataset --pocket --chars=2000000 && python -m scripts.tok_train --vocab_size=4096 &&
        python -m dev.make_mirror "$out/mirror"
}

# The checkpoint of 40 steps equals the one of 20 steps, a kill -9, and 20 more.
resume() {
    launch -m scripts.base_train -- $train --model_tag=whole || return
    setsid python -m dev.launch --standalone --nproc_per_node="$processes" -m scripts.base_train -- $train --model_tag=killed &
    until compgen -G "$NANOCHAT_BASE_DIR/base_checkpoints/killed/step_000020" >/dev/null; do
        kill -0 $! 2>/dev/null || return 1
        sleep 0.1
    done
    pkill -9 --session $!
    launch -m scripts.base_train -- $train --model_tag=killed --resume || return
    cmp "$NANOCHAT_BASE_DIR"/base_checkpoints/{whole,killed}/step_000040/model.safetensors
}

later_stages() {
    local rows=$((4 * processes))
    launch -m scripts.base_eval -- -g whole --max_per_task=8 &&
        launch -m scripts.mid_train -- --model_tag=whole --num_iterations=4 --device_batch_size=4 \
            --total_batch_size=$((rows * 512)) --eval_tokens=$((rows * 512)) &&
        launch -m scripts.chat_sft -- --num_iterations=4 --target_examples_per_step=$((2 * rows)) --eval_steps=2 \
            --eval_metrics_max_problems=16 &&
        launch -m scripts.chat_rl -- --num_iterations=2 --eval_examples=16 --max_new_tokens=32 &&
        launch -m scripts.chat_eval -- -i rl -x 16 --max_new_tokens=32
}

export -f launch data resume later_stages
export out processes train
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader | sort | uniq -c
python -c 'import torch; print("torch", torch.__version__, "CUDA", torch.version.cuda)'
check "tests for GPUs" 90 python -m pytest -q -m gpu tests
check "data" 40 data
check "$processes processes (NCCL), compiled: kill -9 and resume, the same bits" 110 resume
check "CORE, midtraining, SFT, RL, chat evaluation" 110 later_stages
check "training step at depth 12" 80 python -m dev.bench.bench_gpu step
check "CUDA graphs against eager decoding" 50 python -m dev.bench.bench_gpu decode
echo "done in $SECONDS s; all outputs are in $out"
exit $failed
