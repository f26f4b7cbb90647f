#!/usr/bin/env bash
# Creates .venv and runs lint, spelling and type checks and all tests except tests/hosts.
# Arguments are passed to pytest: bash tools/test.sh -k fpn
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv mm,test
cd "$root"

"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m codespell_lib
"$python" -m mypy
# One thread per worker, because workers that share all cores are slower.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
"$python" -m pytest -n 2 --ignore=tests/hosts "$@"
