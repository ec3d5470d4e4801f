#!/usr/bin/env bash
# Prepare a corpus, train, average, translate, score, compare, report: bash scripts/run.sh CORPUS [options of `encourage-mt run`]
# CORPUS is a folder of examples/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
run_with_recipe run "$@"
