#!/usr/bin/env bash
# Base, SFT and both RL stages on the dev split: table and HTML report (outputs/evaluation).
#   bash recipes/evaluate.sh evaluate.only=[sft,guided]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" evaluate "$@"
