#!/usr/bin/env bash
# What all recipes share: the environment, then one stage with what it is missing.
#   bash recipes/run.sh <stage> [key=value ...]
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
root=$(cd "$here/.." && pwd)
bash "$root/recipes/setup.sh"
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
exec "$root/.venv/bin/python" -m tagpr "$@"
