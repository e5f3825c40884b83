#!/usr/bin/env bash
# Checks in seconds what a commit should not break: style, shared files, maps, README's tables, links.  (--help)
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
setup_flags=--dev
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
exec "$python" "$scripts/check.py" "$@"
