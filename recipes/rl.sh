#!/usr/bin/env bash
# The whole RL schedule: guided, then exploratory from its weights (S31); what each came to is in outputs/rl/schedule.json.
#   bash recipes/rl.sh setting=paper rl_hardware=gpu8 launch.restarts=5           13 + 2 epochs
#   bash recipes/rl.sh guided_rl.trainer.total_training_steps=100 schedule.switch_on_plateau=true
#   bash recipes/rl.sh --dry-run
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/recipes/setup.sh"
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 VLLM_NO_USAGE_STATS=1
exec "$root/.venv/bin/python" -m tagpr.rl.schedule "$@"
