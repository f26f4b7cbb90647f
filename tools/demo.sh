#!/usr/bin/env bash
# Demo: creates .venv, installs the library and writes the feature pyramid of a photograph to outputs/demo/.
# Arguments are passed to `resbackbone extract`: bash tools/demo.sh --fpn --checkpoint resnet50.pth
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/venv.sh"
make_venv mm matplotlib # matplotlib ships the photograph

photograph="$("$python" -c 'from matplotlib import cbook; print(cbook.get_sample_data("grace_hopper.jpg", asfileobj=False))')"
"$root/.venv/bin/resbackbone" extract resnet50 "$photograph" --out "$root/outputs/demo" "$@"
