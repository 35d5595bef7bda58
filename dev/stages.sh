# Sourced by the scripts that run everything: a list of stages, each run once.
#
#   stage <title> <seconds it takes> <what it makes, in the base dir> <command...>     declares one
#   run_stages                                                                         runs those that are not done
#
# A stage is done when stamps/<number> in the base dir has the checksum of its command and of all commands before it:
# with other flags it runs again, and so does what follows. While it runs, <number>.begun has that checksum, by which a
# stage that was killed resumes its own checkpoints (--resume=1), and never those of a run with other flags or data.

TITLES=() TIMES=() PRODUCTS=() COMMANDS=()

stage() {
    TITLES+=("$1") TIMES+=("$2") PRODUCTS+=("$3") COMMANDS+=("$(printf '%q ' "${@:4}")")
}

run_stages() {
    local stamps="$NANOCHAT_BASE_DIR/stamps" count=${#TITLES[@]} sum="" spent=0 planned=0
    local i j stamp head sets_pace seconds left started
    mkdir -p "$stamps"
    wait_for_other_runs
    for ((i = 0; i < count; i++)); do
        stamp="$stamps/$i" head="[$((i + 1))/$count] ${TITLES[i]}"
        sum=$(echo "$sum ${COMMANDS[i]}" | sed -E 's/--(run|nproc_per_node)=[^ ]*//g' | cksum) # these may change
        if [[ $(cat "$stamp" 2>/dev/null) == "$sum" && -e $NANOCHAT_BASE_DIR/${PRODUCTS[i]} ]]; then
            echo "$head: done before"
            continue
        fi
        (cd "$stamps" && rm -f $(seq "$i" 99) $(seq -f %g.begun $((i + 1)) 99)) # made from an older product
        left=0 seconds=${TIMES[i]}
        for ((j = i; j < count; j++)); do left=$((left + TIMES[j])); done
        if ((planned)); then # this machine's own pace is known
            left=$((left * spent / planned)) seconds=$((seconds * spent / planned))
        fi
        printf '\n%s ... (about %s; about %s left in all)\n' "$head" "$(duration $seconds)" "$(duration $left)"
        sets_pace="" started=$SECONDS
        if [[ ${COMMANDS[i]} == *--resume=1* && $(cat "$stamp.begun" 2>/dev/null) != "$sum" ]]; then
            sets_pace=1 # a whole training stage; others wait for a network or are short
            set_aside "$NANOCHAT_BASE_DIR/${PRODUCTS[i]}"
        fi
        echo "$sum" >"$stamp.begun"
        eval "${COMMANDS[i]}" || die "$head failed, see above; when that is mended, the same command goes on from here"
        rm "$stamp.begun"
        echo "$sum" >"$stamp"
        seconds=$((SECONDS - started))
        [[ -z $sets_pace ]] || spent=$((spent + seconds)) planned=$((planned + TIMES[i]))
        echo "$head: took $(duration $seconds)"
    done
}

set_aside() { # <folder>: becomes <folder>.old1, or the next free number
    local n=1
    [[ -e $1 ]] || return 0
    while [[ -e $1.old$n ]]; do n=$((n + 1)); done
    mv "$1" "$1.old$n"
    echo "$1 was made with other flags or data: now ${1##*/}.old$n"
}

duration() {
    if (($1 < 90)); then
        echo "$1 s"
    elif (($1 < 5400)); then
        echo "$((($1 + 30) / 60)) min"
    else
        echo "$((($1 + 1800) / 3600)) h"
    fi
}

# The stage of a run that was killed may still be going on; the lock lasts until its last process ends.
wait_for_other_runs() {
    command -v flock >/dev/null || return 0
    exec 9>"$NANOCHAT_BASE_DIR/.run.lock"
    flock --nonblock 9 || {
        echo "another run, or the last stage of one that was killed, is at work in $NANOCHAT_BASE_DIR: waiting for it"
        flock 9
    }
}

# downloading <shards> <command...>: the command, while shards arrive; readers see them only when all are there.
downloading() {
    python -m nanochat.dataset -n "$1" >"$NANOCHAT_BASE_DIR/download.log" 2>&1 9>&- &
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    "${@:2}"
}
