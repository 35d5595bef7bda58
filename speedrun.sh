#!/usr/bin/env bash
# Trains a chat model from raw text:
#
#     bash speedrun.sh
#
# Creates its own environment, picks a tier for this machine (override with TIER=pocket|laptop|single|speedrun), and
# finally prints how to chat. Run it again to continue where it stopped. All outputs are in NANOCHAT_BASE_DIR
# (~/.cache/nanochat). WANDB_RUN=<name> logs to wandb.

[ -n "${BASH_VERSION:-}" ] || exec bash "$0" "$@" # for those who type `sh`
set -euo pipefail
repository=$(dirname "${BASH_SOURCE[0]}")
. "$repository/dev/setup.sh"
. "$repository/dev/stages.sh"
set_base_dir ~/.cache/nanochat
CDPATH="" cd "$repository"

# No GPU, no network: trains on the pocket world, in about a quarter of an hour on two cores.
pocket() {
    local size="--max_seq_len=512 --device_batch_size=8 --eval_tokens=65536 --save_every=100 --keep=2"
    local tasks="PocketPeople|PocketSums|PocketFacts|PocketIdentity|PocketLetters|SpellingBee|PocketStories"
    local world=./nanochat/pocket mixture="$own_data ./nanochat/pocket"
    # Batches of conversations have tensors of ever new sizes; huge pages make their allocation a quarter faster.
    export GLIBC_TUNABLES=glibc.malloc.hugetlb=1
    tag=d4
    stage "report: machine and time" 5 report/header.md "" python -m nanochat.report reset
    stage "corpus: pocket world" 10 base_data $world python -m nanochat.dataset --pocket --chars=8000000
    stage "tokenizer" 10 tokenizer base_data python -m scripts.tok_train --vocab_size=3072
    stage "tokenizer evaluation" 5 report/tokenizer-evaluation.md "tokenizer base_data" python -m scripts.tok_eval
    stage "base pretraining" 90 base_checkpoints/d4 "tokenizer base_data" python -m scripts.base_train "$run" \
        --resume=1 --recipe=tuned --embedding_lr=0.6 --unembedding_lr=0.008 --matrix_lr=0.04 --induction=1 \
        --depth=4 $size --total_batch_size=8192 --num_iterations=170 --eval_every=85 --core_metric_every=-1 \
        --sample_every=25
    stage "base loss" 10 report/base-model-loss.md "base_checkpoints/d4 tokenizer base_data" \
        python -m scripts.base_loss -g d4 --device_batch_size=32 --split_tokens=131072
    stage "midtraining" 465 mid_checkpoints/d4 "base_checkpoints/d4 tokenizer $mixture" \
        python -m scripts.mid_train "$run" --resume=1 --model_tag=d4 $size --total_batch_size=8192 --packing=bos \
        --document_mask=1 --train_on=assistant --eval_every=1000 --recipe=tuned --warmdown_ratio=1 --init_lr_frac=0.6
    stage "midtraining evaluation" 15 report/chat-evaluation-mid.md "mid_checkpoints/d4 tokenizer $world" \
        python -m scripts.chat_eval -i mid -g d4 -a "$tasks" -x 128 --max_new_tokens=320
    stage "supervised finetuning" 25 chatsft_checkpoints/d4 "mid_checkpoints/d4 tokenizer $mixture" \
        python -m scripts.chat_sft "$run" --resume=1 --model_tag=d4 --device_batch_size=8 --init_lr_frac=0.05 \
        --num_iterations=33 --eval_steps=32 --eval_metrics_every=-1 --save_every=50 --keep=2
    stage "SFT evaluation" 20 report/chat-evaluation-sft.md "chatsft_checkpoints/d4 tokenizer $world" \
        python -m scripts.chat_eval -i sft -g d4 -a "$tasks|PocketHardSums" --max_new_tokens=320
    stage "reinforcement learning" 70 chatrl_checkpoints/d4 "chatsft_checkpoints/d4 tokenizer $world" \
        python -m scripts.chat_rl "$run" --resume=1 --model_tag=d4 --num_iterations=24 --eval_every=24 \
        --eval_examples=64 --save_every=20 --keep=2
    stage "RL evaluation" 20 report/chat-evaluation-rl.md "chatrl_checkpoints/d4 tokenizer $world" \
        python -m scripts.chat_eval -i rl -g d4 -a "$tasks|PocketHardSums" --max_new_tokens=320
    stage "report" 5 report/report.md "report/*.json" python -m nanochat.report generate
}

# Number of shards: 20 tokens per parameter, 4.8 characters per token, 250 million characters per shard. `hours` is the
# expected time of pretraining.
laptop() { depth=8 context=1024 batch=8 vocab=32768 shards=22 first=8 hours=7 && public; }
single() { depth=12 context=2048 batch=16 vocab=32768 shards=52 first=8 hours=10 && public; }
speedrun() { depth=20 context=2048 batch=32 vocab=65536 shards=240 first=8 hours=3 && eight_gpus; }
run1000() { depth=32 context=2048 batch=8 vocab=65536 shards=800 first=16 hours=31 && eight_gpus; }

eight_gpus() {
    export OMP_NUM_THREADS=1
    launch="python -m dev.launch --standalone --nproc_per_node=${NPROC_PER_NODE:-8}"
    public
}

# One GPU or eight, public corpus. The tokenizer trains on the `first` shards while the others download.
public() {
    local launch=${launch:-python}
    tag=d$depth
    local base=base_checkpoints/$tag mid=mid_checkpoints/$tag sft=chatsft_checkpoints/$tag
    stage "report: machine and time" 10 report/header.md "" python -m nanochat.report reset
    stage "corpus: first shards" $((first * 15)) "base_data:$first" "" python -m nanochat.dataset -n "$first"
    stage "tokenizer" 180 tokenizer "base_data:$first" downloading "$shards" \
        python -m scripts.tok_train --max_chars=$((first * 250000000)) --vocab_size="$vocab"
    stage "tokenizer evaluation" 20 report/tokenizer-evaluation.md "tokenizer base_data:$first" \
        python -m scripts.tok_eval
    stage "corpus: other shards" $((shards * 5)) "base_data:$shards" "" python -m nanochat.dataset -n "$shards"
    stage "base pretraining" $((hours * 3600)) $base "tokenizer base_data" $launch -m scripts.base_train -- "$run" \
        --resume=1 --recipe=tuned --depth="$depth" --max_seq_len="$context" --device_batch_size="$batch" \
        --save_every=500 --keep=2
    stage "base loss" 120 report/base-model-loss.md "$base tokenizer base_data" \
        $launch -m scripts.base_loss -- -g "$tag" --device_batch_size="$batch"
    stage "base evaluation" 1200 report/base-model-evaluation.md "$base tokenizer" \
        $launch -m scripts.base_eval -- -g "$tag"
    stage "midtraining" $((hours * 400)) $mid "$base tokenizer $own_data" $launch -m scripts.mid_train -- "$run" \
        --resume=1 --model_tag="$tag" --max_seq_len="$context" --device_batch_size="$batch" --save_every=500 --keep=2
    stage "midtraining evaluation" 900 report/chat-evaluation-mid.md "$mid tokenizer" \
        $launch -m scripts.chat_eval -- -i mid -g "$tag"
    stage "supervised finetuning" 900 $sft "$mid tokenizer $own_data" \
        $launch -m scripts.chat_sft -- "$run" --resume=1 --model_tag="$tag"
    stage "SFT evaluation" 900 report/chat-evaluation-sft.md "$sft tokenizer" \
        $launch -m scripts.chat_eval -- -i sft -g "$tag"
    stage "report" 10 report/report.md "report/*.json" python -m nanochat.report generate
}

[[ ${BASH_SOURCE[0]} == "$0" ]] || return 0 # sourced by dev/rehearse.sh, for the lists of stages

gpu_mib=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null || true)
gpus=$(grep -c '[0-9]' <<<"$gpu_mib" || true) # one line per GPU; empty without a driver
smallest=$(sort -n <<<"${gpu_mib:-0}" | head -1)
if ((gpus >= 8 && smallest > 75000)); then
    fits=speedrun
elif ((smallest > 22000)); then
    fits=single
elif ((smallest > 7000)); then
    fits=laptop
else
    fits=pocket
fi
tier=${TIER:-$fits}
case $tier in
pocket | laptop | single | speedrun | run1000) ;;
*) die "TIER=$tier: choose pocket, laptop, single, speedrun or run1000" ;;
esac
echo "tier $tier: $gpus GPUs with $smallest MiB and $(getconf _NPROCESSORS_ONLN) CPU cores suffice for $fits" \
    "(override with TIER=pocket|laptop|single|speedrun)"

set_up
$tier
run_stages
closing_words "$tag"
[[ $tier != run1000 ]] || python -m scripts.chat_web -g "$tag"
