#!/usr/bin/env bash
# Exploratory RL from guided RL's weights (eq. 11; outputs/exploratory_rl).
#   bash recipes/exploratory_rl.sh trainer.total_training_steps=20
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" exploratory_rl "$@"
