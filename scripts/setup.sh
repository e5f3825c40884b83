#!/usr/bin/env bash
# Makes the virtual environment (.venv, or the folder in $VENV) and installs the requirements. Silent when there is nothing to do.
set -euo pipefail
setup_flags="$*"  # --dev: also what the tests and the miniature's builders need
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
