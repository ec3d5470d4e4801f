#!/usr/bin/env bash
# Prepare, train, average, translate, score, compare, report. Takes the options of `encourage-mt run`, such as
# --seeds 1 2 3 --criteria ce el --parallel 2; see recipe.yaml.
set -euo pipefail
source "$(dirname "$0")/../../scripts/environment.sh"
ensure_environment
exec "$VENV/bin/encourage-mt" run "$root/examples/iwslt17_fr_en/recipe.yaml" "$@"
