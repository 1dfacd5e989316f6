#!/usr/bin/env bash
# Serve a trained model: an OpenAI-compatible endpoint where `user` picks the profile (outputs/serve/{server.json, token}).
#   bash recipes/serve.sh serve.model=outputs/guided_rl/model serve.prmu=true     best_of asks PRMU
#   bash recipes/serve.sh serve.profiles=profiles.jsonl server.host=0.0.0.0 server.token_file=token
#   curl -H "authorization: Bearer $(cat outputs/serve/token)" -H 'content-type: application/json' http://127.0.0.1:8300/v1/chat/completions \
#     -d '{"model": "tagpr", "user": "0", "task": "lamp4", "messages": [{"role": "user", "content": "..."}]}'
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" serve "$@"
