#!/usr/bin/env bash
# Benchmark files -> checked Examples (outputs/data). Embedded default: writes synthetic MiniLaMP first.
#   bash recipes/prepare_data.sh benchmark=lamp benchmark.dir=FOLDER benchmark.tasks=[lamp3]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" prepare_data "$@"
