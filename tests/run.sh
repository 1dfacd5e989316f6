#!/usr/bin/env bash
# Set up .venv where it is missing, then everything that must hold: style, types, arrows, tests.
#   bash tests/run.sh                 all of it
#   bash tests/run.sh tests/unit      pytest arguments: only these tests, without the checks before
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash recipes/setup.sh
python=.venv/bin/python
export PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1
step() { echo "[tests ${SECONDS}s] $*"; }

if (($#)); then exec "$python" -m pytest "$@"; fi
step "style (ruff)";            $python -m ruff check . && $python -m ruff format --check .
step "types (mypy)";            $python -m mypy
step "arrows (import-linter)";  .venv/bin/lint-imports
step "unit and contract tests"; $python -m pytest -q -n 2 --dist loadfile -m "not slow and not gpu" --durations=5
step "end-to-end and fault tests on the embedded default"
$python -m pytest -q -m slow --durations=12
step "all passed"
