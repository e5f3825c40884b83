#!/usr/bin/env bash
# Draws the way from each picture to the next:  p2_edit.sh PICTURE PICTURE... OUT   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/run.py" p2_ddim.edit morph "$@"
