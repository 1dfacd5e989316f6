#!/usr/bin/env bash
# Teacher chains, filtered by accuracy and by a judge, tagged; preference pairs for PRMU (outputs/chains).
#   bash recipes/build_chains.sh chains.rollouts=8
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" build_chains "$@"
