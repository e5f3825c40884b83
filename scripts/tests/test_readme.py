"""README is short, its table of results comes from the JSON, every script that it names is there, and the links of all pages lead somewhere."""

import re

from benchmark import summary
from check import broken_links
from common import ROOT, read_json
from results import RESULTS, sentences, table, tables

README = (ROOT / "README.md").read_text()


def test_it_is_short():
    lines = README.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120


def test_its_results_are_the_measured_ones():
    results = {path.stem: read_json(path) for path in RESULTS.glob("*.json")}
    assert table(results) in README, ("python scripts/results.py prints its table; a benchmark that ran here has replaced report/results: put it into README, "
                                      "or take it back by git checkout report")
    for page, told in sentences(results).items():
        text = " ".join((ROOT / page).read_text().split())
        assert not [sentence for sentence in told if sentence not in text], f"{page}: python scripts/results.py prints its sentences"
    for page, told in tables(results).items():
        assert all(rows in (ROOT / page).read_text() for rows in told), f"{page}: python scripts/results.py prints its tables"


def test_what_a_machine_is_slow_in_is_no_row():
    """bf16, where the benchmarks leave it out."""
    results = {path.stem: read_json(path) for path in RESULTS.glob("*.json")}
    results["p1_benchmark"]["dtype"] = "float32"
    for rows in (results["p2_benchmark"]["ways"], results["p3_benchmark"]["rows"]):
        for name in [name for name in rows if name.endswith("bf16")]:
            del rows[name]
    told = table(results)
    assert "bf16" not in told and "| P2: seconds a 256x256 face, full size: plain loop; here |" in told and "straightforward loop: fp32 |" in told


def test_the_summary_of_the_benchmarks_is_of_those_that_are_there():
    results = {problem: read_json(RESULTS / f"{problem}_benchmark.json") for problem in ("p1", "p2", "p3")}
    told = read_json(RESULTS / "summary.json")
    assert told["rows"] == [list(row) for row in summary(results)], "report/results/summary.json is older: bash scripts/benchmark.sh --render"


def test_each_script_that_it_names_is_there_and_each_that_is_there_is_named():
    named = set(re.findall(r"\b(\w+\.sh)\b", README))
    there = {path.name for path in (ROOT / "scripts").glob("*.sh")}
    assert named <= there, named - there
    assert there - named <= {"env.sh", "setup.sh"}, there - named


def test_links_lead_somewhere(tmp_path):
    (tmp_path / "a.md").write_text("# A head, `here`\n[x](b.md#b) [y](b.md#c) [z](none.png) [w](https://a.b/c) ![p](sub) [own](#a-head-here) [no](#nothing)\n")
    (tmp_path / "b.md").write_text("## B\n")
    (tmp_path / "sub").mkdir()
    assert broken_links(tmp_path) == ["a.md: b.md has no heading #c", "a.md: none.png is not there", "a.md: a.md has no heading #nothing"]
    assert broken_links(ROOT) == []
