#!/usr/bin/env bash
# Does PRMU need its user rows? Train it with, without and with frozen random ones, five seeds each (outputs/prmu_variants).
#   bash recipes/prmu_variants.sh prmu_variants.seeds=[0,1,2]
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" prmu_variants "$@"
