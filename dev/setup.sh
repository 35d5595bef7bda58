# Sourced by the scripts that run everything:  . dev/setup.sh; set_up [extra]
# Creates .venv in the repository with uv, or with venv and pip, installs the project into it (`extra`: an optional
# dependency group of pyproject.toml, such as dev) and puts it first on PATH. Does nothing if it is up to date.

die() {
    echo "error: $*" >&2
    exit 2
}

set_up() {
    local extra=${1:-} hash done
    enter_venv
    hash=$(sources_hash)
    for done in ".venv/installed-$extra" .venv/installed-dev; do
        if [[ -e $done && $(cat "$done") == "$hash" ]] && python -c 'from rustbpe import Tokenizer' 2>/dev/null; then
            echo "up to date: $VIRTUAL_ENV"
            return
        fi
    done
    [[ ! -L .venv ]] || die ".venv is a link to an environment installed from other sources; remove the link," \
        "and one of this folder's own is created"
    find_rust
    echo "installing the project into $VIRTUAL_ENV: takes minutes the first time, mostly for PyTorch"
    command -v uv >/dev/null || python -m pip install --quiet uv || true # several times as fast as pip
    install_project "$extra" -c dev/constraints.txt || {
        echo "cannot install the tested versions of dev/constraints.txt; trying the ranges of pyproject.toml"
        install_project "$extra" || die "the installation failed, see above (it needs a package registry and 6 GB)"
    }
    echo "$hash" >".venv/installed-$extra"
}

# Checksum of everything that the installed project is built from, beyond its Python modules: those are used in place.
sources_hash() {
    local crates=(rustbpe/bpe rustbpe/kernels rustbpe/python)
    cat pyproject.toml dev/constraints.txt rustbpe/Cargo.toml "${crates[@]/%//Cargo.toml}" \
        $(find "${crates[@]/%//src}" -name '*.rs' | LC_ALL=C sort) | cksum
}

enter_venv() {
    if ! .venv/bin/python -c '' 2>/dev/null; then
        rm -rf .venv
        make_venv
    fi
    export VIRTUAL_ENV="$PWD/.venv" PATH="$PWD/.venv/bin:$PATH"
    # Common in containers. Without cached bytecode, every stage would compile PyTorch's modules anew, for 2 to 9 s.
    unset PYTHONDONTWRITEBYTECODE
}

make_venv() {
    if command -v uv >/dev/null && uv venv --quiet --python '>=3.10' .venv; then
        return
    fi
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null ||
        die "no Python 3.10 or newer here; install one (apt-get install python3, brew install python) or uv"
    python3 -m venv .venv ||
        die "python3 -m venv does not work here; install the package python3-venv (Debian, Ubuntu) or uv"
}

install_project() { # <extra> [flags]
    local target="." flags=()
    [[ -z $1 ]] || target=".[$1]"
    shift
    if command -v uv >/dev/null; then
        # Without a GPU, PyTorch's CPU build suffices, at a tenth of the size, if its index can be reached.
        if [[ $(uname) == Linux ]] && ! nvidia-smi -L >/dev/null 2>&1; then
            local probe=(uv pip install --quiet --python .venv/bin/python --dry-run --no-deps --reinstall torch)
            if UV_HTTP_RETRIES=0 timeout 15 "${probe[@]}" --torch-backend=cpu 2>/dev/null; then
                flags=(--torch-backend=cpu)
            else
                echo "cannot reach the index of PyTorch's CPU builds; installing the default build instead"
            fi
        fi
        uv pip install --python .venv/bin/python ${flags[@]+"${flags[@]}"} "$@" -e "$target" && return
        .venv/bin/python -m pip --version >/dev/null 2>&1 || return 1
        echo "uv failed; trying pip, which may know another registry or certificate"
    fi
    .venv/bin/python -m pip install --progress-bar off "$@" -e "$target"
}

find_rust() {
    export PATH="$PATH:$HOME/.cargo/bin"
    if ! command -v cargo >/dev/null; then
        echo "cargo not found: installing Rust with rustup"
        local fetch=(curl --proto '=https' --connect-timeout 15 -sSf https://sh.rustup.rs)
        command -v curl >/dev/null || fetch=(wget -q -T 15 -O - https://sh.rustup.rs)
        "${fetch[@]}" | sh -s -- -y -q --profile minimal -c rustfmt -c clippy ||
            die "cannot install Rust automatically; install cargo 1.89 or newer (https://rustup.rs or brew install rust)"
    fi
    local version
    version=$(cargo --version | cut -d' ' -f2)
    [[ $(printf '1.89\n%s\n' "$version" | sort -V | head -1) == 1.89 ]] ||
        die "cargo $version is too old, 1.89 is needed; run rustup update stable (https://rustup.rs)"
    command -v cc >/dev/null || command -v gcc >/dev/null || command -v clang >/dev/null ||
        die "no C compiler; Rust needs one for linking (apt-get install build-essential, or xcode-select --install)"
}
