#!/usr/bin/env bash
# Sets up, then checks the style and runs the tests. Arguments go to pytest:  test.sh -k ddim
set -euo pipefail
setup_flags=--dev
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
cd "${scripts%/*}"
"$python" -m ruff check .
exec "$python" -m pytest -c .pytest.ini --rootdir . "$@"
