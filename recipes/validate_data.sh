#!/usr/bin/env bash
# All that is wrong or suspicious about raw files, by file and line; status 2 if there are errors. Changes nothing.
#   bash recipes/validate_data.sh benchmark=own benchmark.dir=FOLDER
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" validate_data "$@"
