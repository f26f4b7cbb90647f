#!/usr/bin/env bash
# Every check but those in the real hosts: lint, types, tests. Makes .venv first.
# Further arguments go to pytest: bash tools/test.sh -k fpn
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv mm,test
cd "$root"

"$python" -m ruff check .
"$python" -m mypy
# One thread per worker: two workers with all cores each are slower than one.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
"$python" -m pytest -n 2 --ignore=tests/hosts "$@"
