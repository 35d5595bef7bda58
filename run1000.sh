#!/usr/bin/env bash
# Trains the $1000 model: depth 32, 1.9B parameters, 38B tokens, about 31 hours of pretraining on 8 H100s.
#
#     bash run1000.sh
#
# Creates its own environment, as speedrun.sh does. Run it again to continue where it stopped. At the end it starts
# the chat page at http://localhost:8000; Ctrl-C ends it.
# Number of shards: 1.88e9 parameters x 20 tokens x 4.8 characters / 250 million characters = 720; it downloads 800.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" # for those who type `sh`
set -euo pipefail
repository=$(dirname "${BASH_SOURCE[0]}")
. "$repository/dev/setup.sh"
. "$repository/dev/stages.sh"
set_base_dir ~/.cache/nanochat
CDPATH="" cd "$repository"
export OMP_NUM_THREADS=1
run=--run=${WANDB_RUN:-dummy}
launch="python -m dev.launch --standalone --nproc_per_node=${NPROC_PER_NODE:-8}"
base=base_checkpoints/d32 mid=mid_checkpoints/d32 sft=chatsft_checkpoints/d32
own_data="identity_conversations.jsonl ./tasks/mixtures.py" # what midtraining and SFT read of yours

stage "report: machine and time" 10 report/header.md "" python -m nanochat.report reset
stage "corpus: first shards" 120 base_data:16 "" python -m nanochat.dataset -n 16
stage "identity conversations" 5 identity_conversations.jsonl "" fetch_identity
stage "tokenizer" 300 tokenizer base_data:16 downloading 800 python -m scripts.tok_train --max_chars=4000000000
stage "tokenizer evaluation" 20 report/tokenizer-evaluation.md "tokenizer base_data:16" python -m scripts.tok_eval
stage "corpus: other shards" 3600 base_data:800 "" python -m nanochat.dataset -n 800
stage "base pretraining" 111600 $base "tokenizer base_data" $launch -m scripts.base_train -- "$run" --resume=1 \
    --depth=32 --device_batch_size=8 --save_every=1000 --keep=2
stage "base loss" 300 report/base-model-loss.md "$base tokenizer base_data" \
    $launch -m scripts.base_loss -- -g d32 --device_batch_size=8
stage "base evaluation" 1800 report/base-model-evaluation.md "$base tokenizer" $launch -m scripts.base_eval -- -g d32
stage "midtraining" 5400 $mid "$base tokenizer $own_data" \
    $launch -m scripts.mid_train -- "$run" --resume=1 --model_tag=d32 --device_batch_size=8
stage "midtraining evaluation" 1800 report/chat-evaluation-mid.md "$mid tokenizer" \
    $launch -m scripts.chat_eval -- -i mid -g d32
stage "supervised finetuning" 1800 $sft "$mid tokenizer $own_data" \
    $launch -m scripts.chat_sft -- "$run" --resume=1 --model_tag=d32
stage "SFT evaluation" 1800 report/chat-evaluation-sft.md "$sft tokenizer" $launch -m scripts.chat_eval -- -i sft -g d32
stage "report" 10 report/report.md "report/*.json" python -m nanochat.report generate

set_up
run_stages
closing_words d32
python -m scripts.chat_web -g d32
