# Runs a list of stages, each once. Sourced by speedrun.sh and dev/runcpu.sh.
#
#   set_base_dir <default>                                              reads NANOCHAT_BASE_DIR
#   stage <title> <expected seconds> <output> <inputs> <command...>     adds a stage to the list
#   run_stages                                                          runs the unfinished stages
#   closing_words <model tag>                                           prints how to chat with the model
#   $run, $own_data                                                     what the stages of all scripts share
#
# A stage is done if its command and the content of its inputs are what they were, and its output is intact. So after a
# change of flags, text or tokenizer the stages that use them run again, and of the later ones those whose inputs have
# then changed. dev/stamp.py says what the content of an input is. stamps/<output> in the base dir holds the checksum of
# command and inputs, and "done" when the stage has finished. A killed stage resumes its checkpoints (--resume=1) only
# if that checksum is still the same; otherwise they come from a run with other flags or data and are set aside.

(($# == 0)) || die "unknown argument $1: all settings are variables, such as TIER=pocket (see the top of $0)"
run=--run=${WANDB_RUN:-dummy}
own_data="identity_conversations.jsonl ./tasks/mixtures.py" # what midtraining and SFT read of yours
TITLES=() SECONDS_EXPECTED=() OUTPUTS=() INPUTS=() COMMANDS=()

stage() {
    TITLES+=("$1") SECONDS_EXPECTED+=("$2") OUTPUTS+=("$3") INPUTS+=("$4") COMMANDS+=("$(printf '%q ' "${@:5}")")
}

# set_base_dir <default>: makes NANOCHAT_BASE_DIR an absolute path and creates the folder. Call it before any `cd`.
set_base_dir() {
    local base="${NANOCHAT_BASE_DIR:-$1}" home=~
    case $base in
    "~" | "~/"*) base=$home${base#"~"} ;; # quoted where it was set, so no shell has expanded it
    esac
    { mkdir -p -- "$base" 2>/dev/null && [[ -w $base ]]; } ||
        die "cannot write to $base; point NANOCHAT_BASE_DIR at a folder you can write to"
    export NANOCHAT_BASE_DIR
    NANOCHAT_BASE_DIR=$(CDPATH="" cd -- "$base" && pwd)
}

run_stages() {
    local stamps="$NANOCHAT_BASE_DIR/stamps" count=${#TITLES[@]} measured=0 expected=0
    local i j stamp key state title is_training seconds remaining started code problem
    mkdir -p "$stamps"
    # A missing login to wandb is found now, not when pretraining begins.
    [[ -z ${WANDB_RUN:-} ]] || python -m scripts.base_train "--run=$WANDB_RUN" --help >/dev/null || exit
    wait_for_other_runs
    for ((i = 0; i < count; i++)); do
        stamp="$stamps/${OUTPUTS[i]//\//_}" title="[$((i + 1))/$count] ${TITLES[i]}"
        key=$(stamp_of_stage "$i") || die "$title: cannot read its inputs, see above"
        state=${key#* } key=${key% *}
        if [[ $(cat "$stamp" 2>/dev/null) == "$key done" && $state == complete ]]; then
            echo "$title: done before"
            continue
        fi
        remaining=0 seconds=${SECONDS_EXPECTED[i]}
        for ((j = i; j < count; j++)); do remaining=$((remaining + SECONDS_EXPECTED[j])); done
        if ((expected)); then # scale by the measured speed of this machine
            remaining=$((remaining * measured / expected)) seconds=$((seconds * measured / expected))
        fi
        printf '\n%s ... (about %s; at most %s left in all)\n' "$title" "$(duration $seconds)" "$(duration $remaining)"
        is_training="" started=$SECONDS
        if [[ ${COMMANDS[i]} == *--resume=1* ]]; then
            if [[ $(cat "$stamp" 2>/dev/null) != "$key" || $state == damaged ]]; then
                # Only complete training stages measure the machine's speed; others are short or wait for the network.
                is_training=1
                [[ $state == none ]] || set_aside "$NANOCHAT_BASE_DIR/${OUTPUTS[i]}"
            fi
        fi
        # Not rewritten on a full disk, where even an equal stamp would be lost.
        [[ $(cat "$stamp" 2>/dev/null) == "$key" ]] || echo "$key" >"$stamp"
        code=0 problem="failed, see above"
        eval "${COMMANDS[i]}" || code=$?
        # A stage that received SIGTERM saves its state and ends without an error.
        [[ $code != 0 || ${COMMANDS[i]} != *--resume=1* || $(stamp_of_stage "$i") != *partial ]] || code=143
        ((code < 128)) || problem="was stopped"
        ((code == 0)) || {
            echo "error: $title $problem; the same command continues here" >&2
            exit "$code"
        }
        echo "$key done" >"$stamp"
        seconds=$((SECONDS - started))
        [[ -z $is_training ]] || measured=$((measured + seconds)) expected=$((expected + SECONDS_EXPECTED[i]))
        echo "$title: took $(duration $seconds)"
    done
}

# stamp_of_stage <index>: the checksum of a stage's command and inputs, and the state of its output.
stamp_of_stage() {
    python -S -E dev/stamp.py "$NANOCHAT_BASE_DIR" "${OUTPUTS[$1]}" "${INPUTS[$1]}" "${COMMANDS[$1]}"
}

# closing_words <model tag>: prints commands that can be pasted, whatever the paths contain.
closing_words() {
    cat <<END

Done. The report is report.md, with curves report.html; all other outputs are in $NANOCHAT_BASE_DIR. To chat with the
model in the terminal, or on a page at http://localhost:8000:

    cd $(printf %q "$PWD")
    source .venv/bin/activate
    export NANOCHAT_BASE_DIR=$(printf %q "$NANOCHAT_BASE_DIR")
    python -m scripts.chat_cli -g $1
    python -m scripts.chat_web -g $1
END
}

# set_aside <folder>: renames it to <folder>.old1, or to the next free number.
set_aside() {
    local n=1
    [[ -e $1 ]] || return 0
    while [[ -e $1.old$n ]]; do n=$((n + 1)); done
    mv "$1" "$1.old$n"
    echo "$1 was made with other flags or data, or is damaged: renamed to ${1##*/}.old$n"
}

# duration <seconds>: prints a duration in seconds, minutes or hours.
duration() {
    if (($1 < 90)); then
        echo "$1 s"
    elif (($1 < 5400)); then
        echo "$((($1 + 30) / 60)) min"
    else
        echo "$((($1 + 1800) / 3600)) h"
    fi
}

# After a run was killed, its last stage may still be running. The lock is held until its last process exits.
wait_for_other_runs() {
    command -v flock >/dev/null || return 0
    exec 9>"$NANOCHAT_BASE_DIR/.run.lock"
    flock --nonblock 9 || {
        echo "waiting for another run in $NANOCHAT_BASE_DIR, or for the last stage of a killed run"
        flock 9
    }
}

# downloading <shards> <command...>: runs the command while shards download in the background. The command does not see
# the new shards, because the manifest lists them only when all have been downloaded.
downloading() {
    python -m nanochat.dataset -n "$1" >"$NANOCHAT_BASE_DIR/download.log" 2>&1 9>&- &
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    "${@:2}"
}
