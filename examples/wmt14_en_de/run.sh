#!/usr/bin/env bash
# Prepare, train both arms, average, translate, score. Takes the options of `encourage-mt run`; see recipe.yaml.
set -euo pipefail
source "$(dirname "$0")/../../scripts/environment.sh"
ensure_environment
exec "$VENV/bin/encourage-mt" run "$root/examples/wmt14_en_de/recipe.yaml" "$@"
