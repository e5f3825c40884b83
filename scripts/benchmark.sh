#!/usr/bin/env bash
# Runs the three benchmarks, about half an hour on 2 cores:  benchmark.sh
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/benchmark.py" "$@"
