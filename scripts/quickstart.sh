#!/usr/bin/env bash
# Sets up, then runs and grades the main job of each problem on the bundled models.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/quickstart.py" "$@"
