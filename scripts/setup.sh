#!/usr/bin/env bash
# Makes the virtual environment (.venv, or the folder in $VENV), installs the requirements, and prints the interpreter that has them.
[ "${BASH_VERSION-}" ] || exec bash "$0" "$@"
set -euo pipefail
setup_flags="$*"  # --dev: also what the tests and the miniature's builders need; --demo: also what demo.sh needs
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}" || echo "${BASH_SOURCE[0]}")")/env.sh"
echo "$python"
