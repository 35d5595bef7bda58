#!/usr/bin/env bash
# Runs every stage on a CPU with the public corpus and tiny settings: bash dev/runcpu.sh
# It only tests that all parts work together. For a useful model on a CPU, use the pocket tier of speedrun.sh.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. dev/setup.sh
. dev/stages.sh
export NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat-cpu}"
mkdir -p "$NANOCHAT_BASE_DIR"
run=--run=${WANDB_RUN:-dummy}
size="--max_seq_len=1024 --device_batch_size=1 --total_batch_size=1024 --eval_tokens=4096"

stage "report: machine and time" 5 report/header.md python -m nanochat.report reset
stage "corpus" 60 base_data/manifest.json python -m nanochat.dataset -n 4
stage "tokenizer" 300 tokenizer python -m scripts.tok_train --max_chars=1000000000
stage "tokenizer evaluation" 20 report/tokenizer-evaluation.md python -m scripts.tok_eval
stage "base pretraining" 120 base_checkpoints/d4 python -m scripts.base_train "$run" --resume=1 --depth=4 $size \
    --num_iterations=50 --eval_every=50 --sample_every=50 --core_metric_every=50 --core_metric_max_per_task=12
stage "base loss" 20 report/base-model-loss.md python -m scripts.base_loss --device_batch_size=1 --split_tokens=4096
stage "base evaluation" 240 report/base-model-evaluation.md python -m scripts.base_eval --max_per_task=16
stage "midtraining" 240 mid_checkpoints/d4 python -m scripts.mid_train "$run" --resume=1 $size --num_iterations=100
stage "midtraining evaluation" 120 report/chat-evaluation-mid.md \
    python -m scripts.chat_eval -i mid --max-new-tokens=128 --max-problems=20
stage "supervised finetuning" 240 chatsft_checkpoints/d4 python -m scripts.chat_sft "$run" --resume=1 \
    --device_batch_size=1 --target_examples_per_step=4 --num_iterations=100 --eval_steps=4 --eval_metrics_max_problems=16
stage "report" 5 report/report.md python -m nanochat.report generate

set_up
run_stages
echo "Done. To chat: source .venv/bin/activate; NANOCHAT_BASE_DIR=$NANOCHAT_BASE_DIR python -m scripts.chat_cli"
