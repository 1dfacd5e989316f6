#!/usr/bin/env bash
# The model before any training: a tiny Qwen3 made on the spot (embedded default); with setting=paper it is Qwen/Qwen3-8B as it is.
#   bash recipes/base.sh base.steps=2000
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" base "$@"
