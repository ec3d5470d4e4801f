#!/usr/bin/env bash
# From nothing to a table of scores: installs what is missing, then runs the recipe of the bundled corpus.
# Takes the options of `encourage-mt run`. A second run reuses what the first one made.
set -euo pipefail
exec bash "$(dirname "$0")/../examples/bundled_de_en/run.sh" "$@"
