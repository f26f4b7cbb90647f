#!/usr/bin/env bash
# Runs tests/hosts with real mmdet, mmseg and mmpretrain: first OpenMMLab's releases, then the maintained OneDL forks.
# Creates .venv-openmmlab and .venv-onedl; they are separate because their packages have the same import names.
# Arguments are passed to pytest: bash tools/test_hosts.sh -k fpn
#
# mmdet needs mmcv's compiled operators, and PyPI has no wheels with them. RESBACKBONE_WHEELS is the folder of these
# wheels (default: ../shared/wheels beside the checkout), built for Python 3.11 on x86-64 Linux.
# PYTHON is the base interpreter (default: python3).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
wheels="${RESBACKBONE_WHEELS:-$root/../shared/wheels}"
base="${PYTHON:-python3}"
wheel_tags="cp311-cp311-linux_x86_64"

# Packages for both stacks. No timm: mmdet and mmseg import it if it is installed.
shared=("pytest>=8" "pytest-xdist>=3.6" ftfy regex) # mmseg imports ftfy and regex without declaring them
openmmlab=(mmengine==0.10.7 mmdet==3.3.0 mmsegmentation==1.2.2 mmpretrain==1.2.0 torchvision)  # mmpretrain imports torchvision
onedl=(onedl-mmengine==0.10.12 onedl-mmdetection==3.5.1 onedl-mmsegmentation==1.4.2)

fail() {
  echo "error: $*" >&2
  exit 1
}

# make_venv NAME MMCV_WHEEL PACKAGE...: create $root/.venv-NAME and install the stack, if it is missing or outdated.
make_venv() {
  local venv="$root/.venv-$1" wheel="$wheels/$2-$wheel_tags.whl" stamp wanted
  local python="$venv/bin/python" pins=(-c "$root/constraints/cpu.txt")
  shift 2
  [ -f "$wheel" ] || fail "$(basename "$wheel") not found in $wheels; build it from the sdist of that release" \
    "(MMCV_WITH_OPS=1, with the torch of constraints/cpu.txt), or set the folder:" \
    "RESBACKBONE_WHEELS=/folder bash tools/test_hosts.sh"
  stamp="$venv/installed"
  wanted="$* $(cat "$root/pyproject.toml" "$root/constraints/cpu.txt" "$wheel" | cksum)"
  if [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  echo "installing $* into $venv; the first time takes some minutes" >&2
  "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$venv"
  "$python" -m pip install --quiet --upgrade pip
  "$python" -m pip install --quiet "${pins[@]}" torch # first, so that the hosts do not install another version
  "$python" -m pip install --quiet "${pins[@]}" "$wheel" "$@"
  "$python" -m pip install --quiet "${pins[@]}" -e "$root"
  echo "$wanted" >"$stamp"
}

"$base" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null ||
  fail "the wheels of mmcv are for Python 3.11, $base is $("$base" --version 2>/dev/null || echo not found);" \
    "set another one: PYTHON=python3.11 bash tools/test_hosts.sh"
make_venv openmmlab mmcv-2.1.0 "${shared[@]}" "${openmmlab[@]}"
make_venv onedl onedl_mmcv-2.3.6 "${shared[@]}" "${onedl[@]}"

cd "$root"
# One thread per worker, because workers that share all cores are slower.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
status=0
for stack in openmmlab onedl; do
  echo "== tests/hosts in the $stack stack =="
  "$root/.venv-$stack/bin/python" -m pytest tests/hosts -n 2 "$@" || status=1
done
exit "$status"
