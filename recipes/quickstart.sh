#!/usr/bin/env bash
# Everything in order on the embedded default, no GPU needed: data, base model, chains, SFT, PRMU, guided RL, exploratory RL,
# evaluation. Ends with a table; the page to open is outputs/evaluation/report.html. What is already made is kept.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" evaluate "$@"
