#!/usr/bin/env bash
# Serve PRMU over HTTP with a bearer token; prints where. Guided RL starts one by itself unless prmu_client.url is set.
#   bash recipes/serve_prmu.sh server.port=8200
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" serve_prmu "$@"
