#!/usr/bin/env bash
# Does PRMU personalise? Swaps user ids, shuffles and drops profiles, fits rows to new users (outputs/prmu_report/report.{md,html}).
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" prmu_report "$@"
