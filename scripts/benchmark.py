"""Runs the three problems' benchmarks and puts their main figures together: a table, report/results/summary.json and a chart, report/figures/benchmark.png."""

import argparse
import json

from common import ROOT, UserError, atomic_path, fail, files, module, read_json, run, write_whole

RESULTS = ROOT / "report" / "results"
CHART = ROOT / "report" / "figures" / "benchmark.png"
MODULES = {"p1": "p1_cfg_ddpm.benchmark", "p2": "p2_ddim.benchmark", "p3": "p3_clip_textual_inversion.benchmark"}


def summary(results):
    """[(problem, way, value, unit)] of the benchmarks' JSON by problem; what is not there is left out."""
    rows = []
    for name, rate in results.get("p1", {}).get("formats", {}).items():
        rows.append(("P1", f"digit network, {name}", rate, "images/s"))
    for row in results.get("p1", {}).get("ladder", []):
        rows.append(("P1", f"1,000 digits, {row['sampler']}, {row['num_steps']} steps, {row['spacing']}", 1000 / row["images_per_second"], "s"))
    for name, row in results.get("p2", {}).get("ways", {}).items():
        rows.append(("P2", f"256x256 face, {name}", row["seconds_per_image"], "s"))
    units = {"pictures_per_second": "pictures/s", "steps_per_second": "steps/s", "seconds_per_picture": "s/picture"}
    for name, row in results.get("p3", {}).get("rows", {}).items():
        rows += [("P3", name, row[key], unit) for key, unit in units.items() if key in row]
    return rows


def draw_chart(rows, machines, path):
    """A panel of bars for each unit, under a line for each problem's machine, versions and date."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    units = {unit: [row for row in rows if row[3] == unit] for unit in dict.fromkeys(row[3] for row in rows)}
    figure, axes = plt.subplots(len(units), 1, figsize=(9, 1.2 + 0.3 * len(rows) + 0.6 * len(units)), layout="constrained", squeeze=False,
                                height_ratios=[len(group) + 1.5 for group in units.values()])
    for axis, (unit, group) in zip(axes[:, 0], units.items()):
        bars = axis.barh([f"{problem}  {way}" for problem, way, _, _ in group][::-1], [value for _, _, value, _ in group][::-1],
                         color=[f"C{problem[1]}" for problem, *_ in group][::-1])
        axis.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.3g}", padding=3, fontsize=8)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.12)
        axis.set_title(unit, loc="left", fontsize=10)
    titles = [f"{problem.upper()}: " + ", ".join(f"{name} {value}" for name, value in machine.items()) for problem, machine in machines.items()]
    figure.suptitle("\n".join(titles), fontsize=8)
    try:
        with atomic_path(path) as temporary:
            figure.savefig(temporary, dpi=90)
    except UserError as error:
        fail(str(error))
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", choices=list(MODULES), default=list(MODULES),
                        help="problems to measure again; the others keep their numbers (default: all)")
    parser.add_argument("--render", action="store_true", help="measure nothing, only put the numbers together again")
    args = parser.parse_args()
    for problem in [] if args.render else args.only:
        print(f"== {problem}", flush=True)
        if module(MODULES[problem]):
            fail(f"the benchmark of {problem} failed")
    paths = {problem: RESULTS / f"{problem}_benchmark.json" for problem in MODULES}
    results = {problem: read_json(path) for problem, path in paths.items() if path.is_file()}
    try:
        rows = [(problem, way, float(value), unit) for problem, way, value, unit in summary(results)]
        machines = {problem: dict(result["machine"]) for problem, result in results.items()}
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        fail(f"a file in {RESULTS} is no benchmark's: {type(error).__name__}: {error}; measure again with scripts/benchmark.sh")
    if not rows:
        fail(f"{RESULTS} has no benchmark's results; measure with scripts/benchmark.sh")
    write_whole(RESULTS / "summary.json", json.dumps(files.finite({"machines": machines, "rows": rows}), indent=1) + "\n")
    draw_chart(rows, machines, CHART)
    for problem, way, value, unit in rows:  # after what is written: a closed pipe costs nothing
        print(f"{problem}  {way:55} {value:9.2f} {unit}")
    print(f"wrote {RESULTS / 'summary.json'} and {CHART}")


if __name__ == "__main__":
    run(main)
