#!/usr/bin/env bash
# Try several versions of Python. For each interpreter: make a fresh environment outside this folder, then run the tests that
# drive fairseq's commands on a small corpus (train, resume, fine-tune, generate, validate, interact, average, hydra).
# Print the rows of the table of versions in docs/install.md.
#   bash scripts/try_pythons.sh python3.10 python3.12 python3.13
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
[ $# -gt 0 ] || {
    echo "usage: bash scripts/try_pythons.sh PYTHON..." >&2
    exit 2
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
rows=("| Python | fairseq | torch | numpy | commands |" "|---|---|---|---|---|")
failed=0
for python in "$@"; do
    rm -rf "$work/venv"
    result=work
    PYTHON=$python VENV=$work/venv bash "$root/scripts/test.sh" "$root/tests/integration/test_commands.py" -p no:cacheprovider || {
        result="fail"
        failed=1
    }
    if [ ! -e "$work/venv/installed" ]; then
        rows+=("| $python | | | | did not install |")
        continue
    fi
    rows+=("$("$work/venv/bin/python" - "$result" <<'EOF'
import platform
import sys
from importlib.metadata import distributions

versions = {d.metadata["Name"]: d.version for d in distributions()}
fairseq = next(f"{name} {versions[name]}" for name in ("fairseq-fixed", "fairseq") if name in versions)
print(f"| {platform.python_version()} | {fairseq} | {versions['torch']} | {versions['numpy']} | {sys.argv[1]} |")
EOF
)")
done
printf '%s\n' "${rows[@]}"
exit $failed
