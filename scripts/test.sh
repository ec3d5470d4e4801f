#!/usr/bin/env bash
# Install missing packages, then check style and types and run the unit and integration tests: bash scripts/test.sh
#   --all         also run the system tests: whole recipes, several processes, killed trainings
#   --coverage    measure the coverage of lines and branches, and print it
# Other arguments go to pytest; paths in tests/ replace the default tests.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ensure_environment
cd "$root"

tiers=(tests/unit tests/integration)
python=("$VENV/bin/python")
arguments=()
chosen=
for argument in "$@"; do
    case $argument in
        --all) tiers+=(tests/system) ;;
        --coverage) python+=(-m coverage run) ;;
        tests/* | "$root"/tests/*) arguments+=("$argument") chosen=1 ;;
        *) arguments+=("$argument") ;;
    esac
done
# two processes, each with whole files: several files use one training
[ -n "$chosen" ] || arguments+=(--numprocesses=2 --dist=loadfile "${tiers[@]}")

[ ${#python[@]} -eq 1 ] || "$VENV/bin/coverage" erase
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
"$VENV/bin/mypy"
code=0
"${python[@]}" -m pytest "${arguments[@]}" || code=$?
if [ ${#python[@]} -gt 1 ]; then
    "$VENV/bin/coverage" combine --quiet
    "$VENV/bin/coverage" report
fi
exit "$code"
