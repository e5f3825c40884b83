"""The scripts, and their tests, import scripts by plain names, as from their own folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
