#!/usr/bin/env bash
# Counts the GPU memory of each command at its real size, without a GPU, some minutes:  memory.sh
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/memory.py" "$@"
