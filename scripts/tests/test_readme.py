"""README is short, its table of results comes from the JSON, and every script that it names is there."""

import re

from common import ROOT, read_json
from results import RESULTS, table

README = (ROOT / "README.md").read_text()


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_its_results_are_the_measured_ones():
    assert table({path.stem: read_json(path) for path in RESULTS.glob("*.json")}) in README


def test_each_script_that_it_names_is_there_and_each_that_is_there_is_named():
    named = set(re.findall(r"\b(\w+\.sh)\b", README))
    there = {path.name for path in (ROOT / "scripts").glob("*.sh")}
    assert named <= there, named - there
    assert there - named <= {"env.sh", "setup.sh"}, there - named
