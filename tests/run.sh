#!/usr/bin/env bash
# Runs all checks, in an environment that it creates: bash tests/run.sh
# Lint and tests of Python and Rust. pytest includes the slow tests, but not those that need a GPU or the internet.

set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. dev/setup.sh
failed=()

# check <name> <command...>: runs the command and records a failure.
check() {
    echo
    echo "== $1"
    "${@:2}" || {
        echo "FAILED: $1"
        failed+=("$1")
    }
}

# The tests of the chat page need Chromium; without it they are skipped with a message.
install_chromium() {
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v chromium >/dev/null; then
        { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } >/dev/null 2>&1 ||
            echo "cannot install chromium"
    fi
}

check_rust() {
    cd rustbpe || exit 1
    check "cargo fmt" cargo fmt --all --check
    check "cargo clippy" cargo clippy --quiet --workspace --all-targets --all-features -- -D warnings
    check "cargo test" cargo test --quiet --workspace
    check "cargo doc" env RUSTDOCFLAGS="-D warnings" cargo doc --quiet --workspace --no-deps
    ((${#failed[@]} == 0))
}

# Rust and Chromium do not wait for the Python packages, most of whose installation is waiting for the network. They run
# in process groups of their own, which end with this script.
enter_venv
find_rust
rust_log=$(mktemp)
set -m
check_rust >"$rust_log" 2>&1 &
rust=$!
install_chromium &
chromium=$!
set +m
trap 'kill -- -$rust -$chromium 2>/dev/null; rm -f "$rust_log"' EXIT
set_up dev
check "ruff check" ruff check .
check "ruff format" ruff format --check .
check "shell syntax" bash -n speedrun.sh run1000.sh dev/*.sh tests/run.sh .ci/run
wait $rust || failed+=("Rust, see above")
wait $chromium
cat "$rust_log"
echo
if ((${#failed[@]})); then
    echo "FAILED before pytest: ${failed[*]}"
else
    echo "style and Rust: all passed"
fi
echo "== pytest"
# Two processes, one file of tests at a time: the tests of a file share its servers and models.
python -m pytest -q -n 2 --dist loadfile -m "not gpu and not network" || failed+=(pytest)
exit $((${#failed[@]} > 0))
