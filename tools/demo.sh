#!/usr/bin/env bash
# The feature pyramid of a real photograph, from nothing: makes .venv, installs, writes to outputs/demo/.
# Further arguments go to `resbackbone extract`: bash tools/demo.sh --fpn --checkpoint resnet50.pth
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv mm matplotlib # matplotlib ships the photograph

photograph="$("$python" -c 'from matplotlib import cbook; print(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))')"
"$root/.venv/bin/resbackbone" extract resnet50 "$photograph" --out "$root/outputs/demo" "$@"
