#!/usr/bin/env bash
# Average the last checkpoints of a training, translate valid and tests, score. Takes the options of `encourage-mt evaluate`.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
ensure_environment
exec "$VENV/bin/encourage-mt" evaluate "$@"
