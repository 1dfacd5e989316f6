#!/usr/bin/env bash
# Benchmark files -> checked Examples (outputs/data). Embedded default: writes synthetic MiniLaMP first. LaMP, LongLaMP and
# PGraphRAG are fetched where files are missing; without a network it says which files to put where.
#   bash recipes/prepare_data.sh benchmark=lamp benchmark.tasks=[lamp3]       (benchmark.split_by=user: the user-based split)
#   bash recipes/prepare_data.sh benchmark=own benchmark.dir=FOLDER           (validate_data.sh first)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" prepare_data "$@"
