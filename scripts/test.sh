#!/usr/bin/env bash
# Installs what is missing, then lints and tests. Takes the options of pytest.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ensure_environment
cd "$root"
"$VENV/bin/ruff" check .
"$VENV/bin/ruff" format --check .
exec "$VENV/bin/python" -m pytest "$@"
