#!/usr/bin/env bash
# Teacher chains, filtered by accuracy and by a judge, tagged; preference pairs for PRMU (outputs/chains).
#   bash recipes/build_chains.sh chains.rollouts=8
#   bash recipes/build_chains.sh status                                        what a running or stopped job has done
#   bash recipes/build_chains.sh launch.submit=http://head:8265 ...        as a Ray job of a cluster
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
if [[ ${1:-} == status ]]; then
    shift
    bash "$here/setup.sh"
    exec "$here/../.venv/bin/python" -m data_pipeline.status "$@"
fi
# --yes: go on although the estimate is above chains.budget.ask_above_dollars.
exec bash "$here/run.sh" build_chains "${@/#--yes/chains.budget.yes=true}"
