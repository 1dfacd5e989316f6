#!/usr/bin/env bash
# The finished chains and pairs as a Hugging Face datasets folder with its card (outputs/dataset); on demand to the hub.
#   bash recipes/publish_chains.sh publish.push=owner/name
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" publish_chains "$@"
