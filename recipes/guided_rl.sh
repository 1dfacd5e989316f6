#!/usr/bin/env bash
# Guided RL from the SFT model (eq. 5; outputs/guided_rl). Typed alone on a bare machine it makes all it needs.
#   bash recipes/guided_rl.sh trainer.total_training_steps=50 objective.gamma=0.4
#   bash recipes/guided_rl.sh setting=paper            (Qwen3-8B, 8 x A100-80G)
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" guided_rl "$@"
