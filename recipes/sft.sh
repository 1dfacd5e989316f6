#!/usr/bin/env bash
# Supervised fine-tuning on the tagged chains (outputs/sft/model). Embedded default: first makes what is missing.
#   bash recipes/sft.sh optim.lr=1e-3 trainer.total_epochs=2
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" sft "$@"
