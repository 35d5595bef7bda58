#!/usr/bin/env bash
# Trains the $1000 model: depth 32, 1.9B parameters, 38B tokens, about 31 hours of pretraining on 8 H100s.
#
#     bash run1000.sh
#
# Creates its own environment, as speedrun.sh does. Run it again to continue where it stopped. At the end it starts a
# chat in the terminal.
# Number of shards: 1.88e9 parameters x 20 tokens x 4.8 characters / 250 million characters = 720; it downloads 800.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
. dev/setup.sh
. dev/stages.sh
export OMP_NUM_THREADS=1 NANOCHAT_BASE_DIR="${NANOCHAT_BASE_DIR:-$HOME/.cache/nanochat}"
mkdir -p "$NANOCHAT_BASE_DIR"
run=--run=${WANDB_RUN:-dummy}
launch="torchrun --standalone --nproc_per_node=${NPROC_PER_NODE:-8}"
d32="--model_tag=d32"

stage "report: machine and time" 10 report/header.md python -m nanochat.report reset
stage "corpus: first shards" 120 base_data/manifest.json python -m nanochat.dataset -n 16
stage "tokenizer" 300 tokenizer downloading 800 python -m scripts.tok_train --max_chars=4000000000
stage "tokenizer evaluation" 20 report/tokenizer-evaluation.md python -m scripts.tok_eval
stage "corpus: other shards" 3600 base_data/manifest.json python -m nanochat.dataset -n 800
stage "base pretraining" 111600 base_checkpoints/d32 $launch -m scripts.base_train "$run" --resume=1 --depth=32 \
    --device_batch_size=8 --save_every=1000 --keep=2
stage "base loss" 300 report/base-model-loss.md $launch -m scripts.base_loss $d32 --device_batch_size=8
stage "base evaluation" 1800 report/base-model-evaluation.md $launch -m scripts.base_eval $d32
stage "midtraining" 5400 mid_checkpoints/d32 $launch -m scripts.mid_train "$run" --resume=1 $d32 --device_batch_size=8
stage "midtraining evaluation" 1800 report/chat-evaluation-mid.md $launch -m scripts.chat_eval -i mid $d32
stage "supervised finetuning" 1800 chatsft_checkpoints/d32 $launch -m scripts.chat_sft "$run" --resume=1 $d32
stage "SFT evaluation" 1800 report/chat-evaluation-sft.md $launch -m scripts.chat_eval -i sft $d32
stage "report" 10 report/report.md python -m nanochat.report generate

set_up
run_stages
python -m scripts.chat_cli
