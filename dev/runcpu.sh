#!/usr/bin/env bash
# Runs every stage on a CPU with the public corpus and tiny settings: bash dev/runcpu.sh
# It only tests that all parts work together. For a useful model on a CPU, use the pocket tier of speedrun.sh.

set -euo pipefail
repository=$(dirname "${BASH_SOURCE[0]}")/..
. "$repository/dev/setup.sh"
. "$repository/dev/stages.sh"
set_base_dir ~/.cache/nanochat-cpu
CDPATH="" cd "$repository"
size="--max_seq_len=1024 --device_batch_size=1 --total_batch_size=1024 --eval_tokens=4096"

base=base_checkpoints/d4 mid=mid_checkpoints/d4 sft=chatsft_checkpoints/d4

stage "report: machine and time" 5 report/header.md "" python -m nanochat.report reset
stage "corpus" 60 base_data:4 "" python -m nanochat.dataset -n 4
stage "tokenizer" 300 tokenizer base_data python -m scripts.tok_train --max_chars=1000000000
stage "tokenizer evaluation" 20 report/tokenizer-evaluation.md "tokenizer base_data" python -m scripts.tok_eval
stage "base pretraining" 120 $base "tokenizer base_data" python -m scripts.base_train "$run" --resume=1 \
    --recipe=tuned --depth=4 $size --num_iterations=50 --eval_every=50 --sample_every=50 --core_metric_every=50 \
    --core_metric_max_per_task=12
stage "base loss" 20 report/base-model-loss.md "$base tokenizer base_data" \
    python -m scripts.base_loss -g d4 --device_batch_size=1 --split_tokens=4096
stage "base evaluation" 240 report/base-model-evaluation.md "$base tokenizer" \
    python -m scripts.base_eval -g d4 --max_per_task=16
stage "midtraining" 240 $mid "$base tokenizer $own_data" \
    python -m scripts.mid_train "$run" --resume=1 --model_tag=d4 $size --num_iterations=100
stage "midtraining evaluation" 120 report/chat-evaluation-mid.md "$mid tokenizer" \
    python -m scripts.chat_eval -i mid -g d4 --max-new-tokens=128 --max-problems=20
stage "supervised finetuning" 240 $sft "$mid tokenizer $own_data" python -m scripts.chat_sft "$run" --resume=1 \
    --model_tag=d4 --device_batch_size=1 --target_examples_per_step=4 --num_iterations=100 --eval_steps=4 \
    --eval_metrics_max_problems=16
stage "report" 5 report/report.md "report/*.json" python -m nanochat.report generate

[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0 # sourced by dev/rehearse.sh

set_up
run_stages
closing_words d4
