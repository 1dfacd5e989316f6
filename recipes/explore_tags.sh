#!/usr/bin/env bash
# Free tags for some of the judged chains, clustered: outputs/chains/{clusters.html, mapping.yaml} (S9, S10).
#   bash recipes/explore_tags.sh chains.exploratory.chains=0.2
# Edit mapping.yaml, then make a vocabulary of it and give it to every stage:
#   bash recipes/make_vocabulary.sh outputs/chains/mapping.yaml my_tags.yaml
#   bash recipes/quickstart.sh tags.vocabulary=my_tags.yaml run.outputs=outputs/my_tags
set -euo pipefail
exec bash "$(dirname "${BASH_SOURCE[0]}")/run.sh" build_chains chains.exploratory.chains=1000 chains.stop_after=exploratory "$@"
