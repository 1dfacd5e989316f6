#!/usr/bin/env bash
# Serve PRMU over HTTP with a bearer token; prints where. Guided RL starts one by itself unless prmu_client.url is set.
#   bash recipes/serve_prmu.sh server.port=8200
#   bash recipes/serve_prmu.sh server.replicas=2                    two processes, replaced when they die or hang
#   bash recipes/serve_prmu.sh server.replicas=4 server.ray=auto server.replica_gpus=1 server.host=0.0.0.0 server.token_file=token
# <run.dir>/server.json has the addresses; give them to RL as 'prmu_client.url="http://a:8200,http://b:8201"'.
# kill -HUP <pid in server.json>: take the checkpoint that is now in paths.prmu, without dropping a request.
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" serve_prmu "$@"
