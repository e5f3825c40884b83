#!/usr/bin/env bash
# Runs the three benchmarks, about half an hour on 2 cores:  benchmark.sh
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/benchmark.py" "$@"
