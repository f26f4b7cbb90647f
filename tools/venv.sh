# Sourced by the other scripts; defines `root`, the folder of the checkout, and the function
#
#   make_venv EXTRAS [PACKAGE...]
#
# which creates $root/.venv if it does not exist, installs resbackbone[EXTRAS] (editable) and the packages, and sets
# `python` to its interpreter. Nothing is installed again unless the arguments, pyproject.toml or the pins changed.
# PYTHON is the base interpreter (default: python3).

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

make_venv() {
  local extras="$1" base="${PYTHON:-python3}" venv="$root/.venv" stamp wanted
  shift
  python="$venv/bin/python"
  stamp="$venv/installed-${extras//,/-}"
  wanted="$* $(cat "$root/pyproject.toml" "$root/constraints/cpu.txt" | cksum)"
  if [ -x "$python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
    return
  fi
  if ! "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    echo "error: Python 3.10 or later is needed, $base is $("$base" --version 2>/dev/null || echo not found);" \
      "set another one: PYTHON=python3.12 bash $0" >&2
    return 1
  fi
  local pins=(-c "$root/constraints/cpu.txt")
  if command -v nvidia-smi >/dev/null; then
    pins=(--prefer-binary) # with a GPU, use pip's default torch build
  fi
  echo "installing resbackbone[$extras] into $venv; the first time takes some minutes" >&2
  "$python" -m pip --version >/dev/null 2>&1 || "$base" -m venv "$venv"
  "$python" -m pip install --quiet --upgrade pip
  # torch first, so that the other packages do not install another version.
  "$python" -m pip install --quiet "${pins[@]}" torch
  "$python" -m pip install --quiet "${pins[@]}" -e "$root[$extras]" "$@"
  echo "$wanted" >"$stamp"
}
