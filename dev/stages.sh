# Runs a list of stages, each once. Sourced by speedrun.sh, run1000.sh and dev/runcpu.sh.
#
#   stage <title> <expected seconds> <output, relative to the base dir> <command...>     adds a stage to the list
#   run_stages                                                                           runs the unfinished stages
#
# When a stage has finished, stamps/<number> in the base dir holds a checksum of its command and of all commands before
# it. So if a flag changes, that stage and all later ones run again. While a stage runs, stamps/<number>.begun holds the
# checksum. A killed stage may resume its checkpoints (--resume=1) only if that checksum is still the same; otherwise
# they come from a run with other flags or data.

TITLES=() SECONDS_EXPECTED=() OUTPUTS=() COMMANDS=()

stage() {
    TITLES+=("$1") SECONDS_EXPECTED+=("$2") OUTPUTS+=("$3") COMMANDS+=("$(printf '%q ' "${@:4}")")
}

run_stages() {
    local stamps="$NANOCHAT_BASE_DIR/stamps" count=${#TITLES[@]} sum="" measured=0 expected=0
    local i j stamp title is_training seconds remaining started
    mkdir -p "$stamps"
    wait_for_other_runs
    for ((i = 0; i < count; i++)); do
        stamp="$stamps/$i" title="[$((i + 1))/$count] ${TITLES[i]}"
        # --run and --nproc_per_node do not change what a stage computes, so they are left out of the checksum.
        sum=$(echo "$sum ${COMMANDS[i]}" | sed -E 's/--(run|nproc_per_node)=[^ ]*//g' | cksum)
        if [[ $(cat "$stamp" 2>/dev/null) == "$sum" && -e $NANOCHAT_BASE_DIR/${OUTPUTS[i]} ]]; then
            echo "$title: done before"
            continue
        fi
        # Later stages used an older output of this stage, so their stamps are no longer valid.
        (cd "$stamps" && rm -f $(seq "$i" 99) $(seq -f %g.begun $((i + 1)) 99))
        remaining=0 seconds=${SECONDS_EXPECTED[i]}
        for ((j = i; j < count; j++)); do remaining=$((remaining + SECONDS_EXPECTED[j])); done
        if ((expected)); then # scale by the measured speed of this machine
            remaining=$((remaining * measured / expected)) seconds=$((seconds * measured / expected))
        fi
        printf '\n%s ... (about %s; about %s left in all)\n' "$title" "$(duration $seconds)" "$(duration $remaining)"
        is_training="" started=$SECONDS
        if [[ ${COMMANDS[i]} == *--resume=1* && $(cat "$stamp.begun" 2>/dev/null) != "$sum" ]]; then
            # Only complete training stages measure the machine's speed; others are short or wait for the network.
            is_training=1
            set_aside "$NANOCHAT_BASE_DIR/${OUTPUTS[i]}"
        fi
        echo "$sum" >"$stamp.begun"
        eval "${COMMANDS[i]}" || die "$title failed, see above; fix the cause and run the same command to continue here"
        rm "$stamp.begun"
        echo "$sum" >"$stamp"
        seconds=$((SECONDS - started))
        [[ -z $is_training ]] || measured=$((measured + seconds)) expected=$((expected + SECONDS_EXPECTED[i]))
        echo "$title: took $(duration $seconds)"
    done
}

# set_aside <folder>: renames it to <folder>.old1, or to the next free number.
set_aside() {
    local n=1
    [[ -e $1 ]] || return 0
    while [[ -e $1.old$n ]]; do n=$((n + 1)); done
    mv "$1" "$1.old$n"
    echo "$1 was made with other flags or data: renamed to ${1##*/}.old$n"
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
