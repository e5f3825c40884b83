#!/usr/bin/env bash
# Puts what was trained where the graded scripts find it:  install.sh runs/base/model.safetensors   install.sh runs/words   (--help explains)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/install.py" "$@"
