"""Runs a module of the project as `python -m` does, from any folder, but imports nothing from the folder that one stands in:  run.py MODULE ARGUMENTS"""

import sys
from os.path import abspath, dirname

sys.path[0] = dirname(dirname(abspath(__file__)))  # in place of this folder, whose names (setup, common) mean other things elsewhere
name = sys.argv[1]
sys.argv[:2] = ["-m"]  # what `python -m` has there while it imports the package, whose guard.py then begins

import runpy  # noqa: E402

runpy.run_module(name, run_name="__main__", alter_sys=True)
