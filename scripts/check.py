"""What takes seconds to check before a commit: style, the files that three folders share, the maps, README's tables, and where links lead.

A fault is one line. The tests are another command: scripts/test.sh.
"""

import argparse
import re
import subprocess
import sys

from common import ROOT, run

QUICK = [f"scripts/tests/{name}.py" for name in ("test_common_ground", "test_house", "test_readme")]
SKIPPED = {".venv", "out", "runs", "node_modules"}


def anchors_of(text):
    """What GitHub calls the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"^( {4}|```).*$", "", text, flags=re.MULTILINE), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(root):
    """["file: where a link of it leads to nothing"] of all pages in Markdown; addresses on the web are not asked."""
    broken = []
    for page in sorted(root.rglob("*.md")):
        if SKIPPED & set(page.relative_to(root).parts) or any(part.startswith(".") for part in page.relative_to(root).parts):
            continue
        if page.parent == root / "report" / "text":  # what report.md is made of, where a picture may come later
            continue
        for target in re.findall(r"\]\(([^)\s]+)[^)]*\)", page.read_text(encoding="utf-8")):
            path, _, anchor = target.partition("#")
            if re.match(r"[a-z]+:", target):
                continue
            there = (page.parent / path) if path else page
            if not there.exists():
                broken.append(f"{page.relative_to(root)}: {target} is not there")
            elif anchor and there.suffix == ".md" and anchor not in anchors_of(there.read_text(encoding="utf-8")):
                broken.append(f"{page.relative_to(root)}: {there.name} has no heading #{anchor}")
    return broken


def main():
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    faults = broken_links(ROOT)
    for what, command in (("style: see above", ["ruff", "check", "-q", "--output-format", "concise", "."]),
                          ("a quick test failed: see above", ["pytest", "-c", ".pytest.ini", "--rootdir", ".", "-q", "--no-header", "--tb=short",
                                                              "-p", "no:cacheprovider", "--durations=0", "--durations-min=9", *QUICK])):
        if subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=False).returncode:
            faults.append(what)
    if faults:
        sys.exit("\n".join(f"error: {fault}" for fault in faults))
    print("style, shared files, maps, tables and links are as they should be")


if __name__ == "__main__":
    run(main)
