#!/usr/bin/env bash
# The page of an RL run: alerts, curves, rollouts, what was configured (outputs/<run.name>/report.html), also while it runs.
#   bash recipes/report.sh run.name=exploratory_rl
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" report "$@"
