import os
import subprocess
import sys

import pytest

from p2_ddim.files import ROOT


@pytest.fixture
def command():
    """Runs `python -m MODULE ARGS...` as a user would; returns (exit code, stdout, stderr), or with wait=False the process."""
    def run(module, *arguments, launcher=(), wait=True, **environment):
        line = [sys.executable, *launcher, "-m", module, *map(str, arguments)]
        process = subprocess.Popen(line, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        if not wait:
            return process
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err
    return run
