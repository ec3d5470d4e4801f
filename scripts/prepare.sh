#!/usr/bin/env bash
# Turn the raw text of a corpus into binarized data: bash scripts/prepare.sh CORPUS [options of `encourage-mt prepare`]
# CORPUS is a folder of examples/.
set -euo pipefail
source "$(dirname "$0")/environment.sh"
run_with_recipe prepare "$@"
