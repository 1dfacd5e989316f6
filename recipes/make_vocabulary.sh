#!/usr/bin/env bash
# From a mapping that a person has edited to a vocabulary file for tags.vocabulary (S10, S41).
#   bash recipes/make_vocabulary.sh outputs/chains/mapping.yaml my_tags.yaml
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
bash "$root/recipes/setup.sh"
exec "$root/.venv/bin/python" -m data_pipeline.mapping "$@"
