#!/usr/bin/env bash
# A sheet with a sample of the finished chains to judge by eye; then the share that is right (outputs/review).
#   bash recipes/review_chains.sh review.chains=100
#   bash recipes/review_chains.sh review.verdicts=verdicts.json review.reviewer=first
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" review_chains "$@"
