#!/usr/bin/env bash
# New users join PRMU without training it again: a row for each, fitted to a few preference pairs (a new checkpoint version).
#   bash recipes/add_prmu_users.sh cold_start.pairs=new_users.jsonl cold_start.target=outputs/prmu/with_new_users
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" add_prmu_users "$@"
