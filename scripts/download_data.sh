#!/usr/bin/env bash
# Downloads the course's data (about 1 GB) into hw2_data/; run it again to go on after an interruption.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/download_data.py" "$@"
