#!/usr/bin/env bash
# Guided RL under several reward weights and seeds, then one table with what each came to and how stable it is (S42; outputs/weights_grid).
#   bash recipes/weights_grid.sh 'grid.weights=[[0.8,0.8,0.2],[0.8,0.8,0.4]]' grid.seeds=[0,1] trainer.total_training_steps=24
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/recipes/setup.sh"
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
exec "$root/.venv/bin/python" -m tagpr.rl.weights_grid "$@"
