#!/usr/bin/env bash
# Sets up, then checks the style and runs the tests, a file at a time on each core. Arguments go to pytest:  test.sh -k ddim;  test.sh -n 0 --pdb
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
setup_flags=--dev
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
cd "${scripts%/*}"
"$python" -m ruff check .
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}  # each core has a process of its own
exec "$python" -m pytest -c .pytest.ini --rootdir . -n auto --maxprocesses 4 --dist loadfile "$@"
