#!/usr/bin/env bash
# Sets up, then opens a page to play with, on this machine alone and without internet:  demo.sh   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
setup_flags=--demo
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/demo.py" "$@"
