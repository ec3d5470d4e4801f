#!/usr/bin/env bash
# From raw text to binarized data: bash scripts/prepare.sh CORPUS [options of `encourage-mt prepare`]
# CORPUS is a folder of examples/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
recipe=$root/examples/${1:-}/recipe.yaml
if [ -z "${1:-}" ] || [ ! -f "$recipe" ]; then
    known=("$root"/examples/*/recipe.yaml)
    known=("${known[@]%/recipe.yaml}")
    fail "unknown corpus '${1:-}'; there are: ${known[*]##*/}"
fi
ensure_environment
shift
exec "$VENV/bin/encourage-mt" prepare "$recipe" "$@"
