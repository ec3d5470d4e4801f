# Sourced by the other scripts: creates or reuses a virtual environment with everything this project needs.
# VENV is its folder (default: .venv of this project), PYTHON the interpreter that makes it (default: python3).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$root/.venv}
VENV=${VENV%/}
[[ $VENV = /* ]] || VENV=$PWD/$VENV
EXTRAS=fairseq,recipes,serving,transformers,classification,test

fail() {
    echo "error: $1" >&2
    exit 2
}

check_python() { # of "$1", before anything is made
    command -v "$1" >/dev/null || fail "$1 not found; install Python 3.10 to 3.13 (Debian: apt-get install python3 python3-venv)"
    local version
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
    case $version in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *)
            [ "$1" = "$VENV/bin/python" ] && fail "$VENV has Python $version, which is not supported; remove it"
            fail "Python $version is not supported; name one from 3.10 to 3.13: PYTHON=python3.11 bash $0"
            ;;
    esac
    "$1" -c 'import venv, ensurepip' 2>/dev/null ||
        fail "Python's venv module is missing; install it (Debian: apt-get install python3-venv)"
    [ "$version" = 3.12 ] && return # fairseq has a wheel for 3.12 only; for other versions it is built
    command -v g++ >/dev/null || fail "no C++ compiler to build fairseq with; install one (Debian: apt-get install g++)"
    "$1" -c 'import os, sysconfig as s, sys; sys.exit(not os.path.exists(os.path.join(s.get_paths()["include"], "Python.h")))' ||
        fail "Python's headers to build fairseq with are missing; install them (Debian: apt-get install python3-dev)"
}

has_programs() { # a venv that was interrupted, or whose Python is gone, lacks one of them
    [ -x "$VENV/bin/python" ] && [ -x "$VENV/bin/pip" ]
}

ensure_environment() {
    local wanted pip
    wanted="$root $(cat "$root"/{setup.py,scripts/constraints.txt,encourage_mt/loss/native.cpp,encourage_mt/loss/native_vectors.h} | sha256sum)"
    [ "$(cat "$VENV/installed" 2>/dev/null)" = "$wanted" ] && return
    if has_programs; then
        check_python "$VENV/bin/python"
        "$VENV/bin/pip" --version >/dev/null 2>&1 || fail "the programs in $VENV do not start; was it moved? Remove it"
    else
        check_python "${PYTHON:-python3}"
    fi
    mkdir -p "$(dirname "$VENV")"
    exec 9>"$VENV.lock" # two installations at the same time would damage each other
    ! command -v flock >/dev/null || flock 9
    [ "$(cat "$VENV/installed" 2>/dev/null)" = "$wanted" ] && exec 9>&- && return
    has_programs || "${PYTHON:-python3}" -m venv "$VENV"
    pip=("$VENV/bin/python" -m pip install --disable-pip-version-check -c "$root/scripts/constraints.txt")
    echo "Installing into $VENV, only this time. If fairseq must be built from source, this takes about 5 minutes."
    if "$VENV/bin/python" -c 'import sys; sys.exit(sys.version_info >= (3, 11))'; then
        # stock fairseq 0.12.2 builds in isolation only, and needs a pip that accepts the metadata of omegaconf 2.0
        "${pip[@]}" 'pip<24.1' setuptools wheel
        "${pip[@]}" -e "$root[${EXTRAS/transformers,/}]" # transformers is not tested there; its tests skip
        "${pip[@]}" --no-build-isolation --no-deps -e "$root" # again, with torch: compiles the loss
    else
        # an isolated build of fairseq would fetch a second torch
        "${pip[@]}" torch numpy cython setuptools wheel ninja
        "${pip[@]}" --no-build-isolation -e "$root[$EXTRAS]"
    fi
    # fairseq-fixed needs torchaudio only for speech, and a torchaudio that this torch cannot load breaks transformers
    "$VENV/bin/python" -c 'import torchaudio' 2>/dev/null || "$VENV/bin/python" -m pip uninstall -qy torchaudio
    echo "$wanted" >"$VENV/installed"
    exec 9>&-
}

run_with_recipe() { # encourage-mt "$1" with the recipe of corpus "$2" and the other arguments as options
    local command=$1 recipe=$root/examples/${2:-}/recipe.yaml known
    if [ -z "${2:-}" ] || [ ! -f "$recipe" ]; then
        known=("$root"/examples/*/recipe.yaml)
        known=("${known[@]%/recipe.yaml}")
        fail "unknown corpus '${2:-}'; choose one of: ${known[*]##*/}"
    fi
    ensure_environment
    shift 2
    exec "$VENV/bin/encourage-mt" "$command" "$recipe" "$@"
}
