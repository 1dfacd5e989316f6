#!/usr/bin/env bash
# Trained models as Hugging Face folders with their cards (outputs/export/<run>); without a name, every finished run of training.
#   bash recipes/export.sh outputs/guided_rl outputs/exploratory_rl
#   bash recipes/export.sh outputs/guided_rl export.step=16 export.to=my_model
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
runs=() settings=()
for word in "$@"; do
    if [[ $word == *=* || $word == -* ]]; then settings+=("$word"); else runs+=("$word"); fi
done
if ((${#runs[@]} == 0)); then
    for run in outputs/*/; do
        if [[ -f $run/finished.json && -d $run/model && $run != outputs/prmu/ ]]; then runs+=("${run%/}"); fi
    done
fi
if ((${#runs[@]} == 0)); then
    echo "error: outputs: has no finished run. Name one: bash recipes/export.sh FOLDER" >&2
    exit 2
fi
for run in "${runs[@]}"; do
    bash "$here/run.sh" export "export.run=$run" ${settings[@]+"${settings[@]}"}
done
