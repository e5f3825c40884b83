#!/usr/bin/env bash
# Draws the figures again and writes report/report.md and report/index.html:  report.sh [--render]   (--help lists the flags)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/report.py" "$@"
