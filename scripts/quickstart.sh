#!/usr/bin/env bash
# Install missing packages, then train, score and compare on the bundled corpus. Takes the options of `encourage-mt run`.
# A second run reuses the work of the first.
set -euo pipefail
exec bash "$(dirname "$0")/run.sh" bundled_de_en "$@"
