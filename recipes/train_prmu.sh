#!/usr/bin/env bash
# Train PRMU, the reward model that knows the user, on preference pairs (outputs/prmu/model).
#   bash recipes/train_prmu.sh train_prmu.epochs=2
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" train_prmu "$@"
