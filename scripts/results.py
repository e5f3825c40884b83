"""README's table of results, P1's tables of what helped, and the limits that the bundled weights' pages tell, from the JSON that the benchmarks, the report
and the trials wrote.

    python scripts/results.py        # prints them
"""

from statistics import fmean

from common import ROOT, read_json, run

RESULTS = ROOT / "report" / "results"


def rows(results):
    """[(what, number, command)]"""
    p1, p2, back, faces, p3 = (results[name] for name in ("p1_benchmark", "p2_benchmark", "p2_exact", "p2_quality", "p3_benchmark"))
    seeds, student = p1["seeds"], p1["student"]
    ways, speed = p2["ways"], p3["rows"]
    zero_shot = results["p3_zero_shot"]
    word = results["p3_words"]["bundled"]["concepts"]["<new1>"]
    single, pair = (results["p3_miniature"][name]["clip"] for name in ("one subject", "two subjects"))

    there = max(back[kind]["fp32"]["mse"] for kind in ("references", "drawings"))

    def mean(some, domain, name="accuracy"):
        return fmean(row[domain][name] for row in some)

    def seconds(some):
        return fmean(row["seconds"] for row in some)

    faster = [speed[f"textual inversion, this project, {name}"]["steps_per_second"] / speed[f"textual inversion, straightforward, {name}"]["steps_per_second"]
              for name in ("fp32", "bf16")]
    return [
        ("P1: right among 1,000 digits, MNIST-M; SVHN (five seeds)", f"{mean(seeds, 'mnistm'):.1%}; {mean(seeds, 'svhn'):.1%}", "p1_benchmark.sh"),
        ("P1: the student of one evaluation, likewise", f"{mean(student, 'mnistm'):.1%}; {mean(student, 'svhn'):.1%}", "p1_benchmark.sh"),
        ("P1: Fréchet distance, as many real digits = 1", f"{mean(seeds, 'mnistm', 'frechet'):.1f}; {mean(seeds, 'svhn', 'frechet'):.1f}", "p1_benchmark.sh"),
        ("P1: seconds for 1,000; by the student", f"{seconds(seeds):.0f}; {seconds(student):.1f}", "p1_benchmark.sh"),
        ("P2: squared error to diffusers' references (limit 20)", f"{p2['miniature_mse']['fp32']:.4f}", "p2_benchmark.sh"),
        ("P2: seconds a 256x256 face, full size: plain loop; here; bf16",
         "; ".join(f"{ways[way]['seconds_per_image']:.0f}" for way in ("plain loop, fp32", "this project, fp32", "this project, bf16")), "p2_benchmark.sh"),
        ("P2: picture to noise and back, squared error", f"{there:.2f}", "-m p2_ddim.edit measure"),
        ("P2: Fréchet distance of the miniature's faces, as many drawn = 1: exact; good",
         "; ".join(f"{faces[quality]['frechet']['ratio']:.1f}" for quality in ("exact", "good")), "-m p2_ddim.quality"),
        ("P3: zero-shot top-1 of 50 unseen-style classes", f"{zero_shot['top1']:.1%}", "report.sh --only zero-shot"),
        ("P3: a learned word; its initial words; real drawings", "; ".join(f"{word[way]['image']:.0f}" for way in ("learned", "initial", "real")),
         "-m p3_clip_textual_inversion.miniature.words"),
        ("P3: read right over real drawings: one; two in place", f"{single['over_real']:.2f}; {pair['over_real']:.2f}",
         "-m p3_clip_textual_inversion.miniature.scores"),
        ("P3: pictures a second, ViT-B/32: plain open_clip; here; bf16", "; ".join(f"{speed[f'ViT-B/32, {way}']['pictures_per_second']:.0f}" for way in (
            "plain open_clip, fp32", "this project, fp32", "this project, bf16")), "p3_benchmark.sh"),
        ("P3: learning, times a straightforward loop: fp32; bf16", "; ".join(f"{times:.2f}" for times in faster), "p3_benchmark.sh"),
    ]


def table(results):
    machine = results["p1_benchmark"]["machine"]
    lines = [f"| times: {machine['threads']} cores of an {machine['device']} | measured | by |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {what} | {number} | `{command}` |" for what, number, command in rows(results)])


def limits(results):
    """{page: the sentence with numbers that its "Limits" begin with}"""
    p1, single = results["p1_benchmark"], results["p3_miniature"]["one subject"]["clip"]
    zero_shot, several, faces = results["p3_zero_shot"], results["p3_several"], results["p2_quality"]
    exact = faces["exact"]

    def span(name, kind="seeds"):
        """The least and the most over the seeds, MNIST-M; SVHN."""
        return "; ".join("{:.2f} to {:.2f}".format(*(pick(row[domain][name] for row in p1[kind]) for pick in (min, max))) for domain in ("mnistm", "svhn"))

    return {
        "p1_cfg_ddpm/weights/README.md":
            f"Measured over {len(p1['seeds'])} seeds of 1,000 digits (MNIST-M; SVHN), as many real digits = 1: coverage {span('coverage')}, "
            f"Fréchet distance {span('frechet')}; by the student {span('coverage', 'student')} and {span('frechet', 'student')}. "
            f"Of the digit that is read worst, the share that is read right: {span('worst_digit')}.",
        "hw2_data/mini/README.md":
            f"Measured: CLIP names {zero_shot['top1']:.1%} of {zero_shot['images']} pictures of the unseen style, and is surer of its answers "
            f"than they are right by {zero_shot['ece']:.0%} (expected calibration error); it takes {single['drawn']['share']:.1%} of Stable Diffusion's "
            f"guided pictures for what they are, {single['real']['share']:.1%} of real drawings of the same things; "
            f"with regions two known things are both found in {several['known']['words, regions']['both']:.0%} of pictures, "
            f"two learned apart in {several['methods']['words learned apart, regions']['a <new1> next to a <new3>']['both']:.0%}. "
            f"{faces['count']} faces by the course's convention: Fréchet distance {exact['frechet']['ratio']:.1f}, energy of high frequencies "
            f"{exact['high_frequency']['ratio']:.2f} (as many drawn ones = 1), grain of {exact['grain']['generated']:.1f} grey levels in flat places.",
    }


def scores(row):
    """The cells of a row of P1's tables: accuracy, the second judges', distance and coverage, MNIST-M then SVHN. row: one, or several whose mean is told."""
    several = row if isinstance(row, list) else [row]

    def both(name, factor=1):
        return ", ".join(f"{factor * fmean(one[domain][name] for one in several):.2f}" for domain in ("mnistm", "svhn") if domain in several[0])

    return [both("accuracy", 100), both("second_accuracy", 100), both("frechet"), both("coverage")]


def flags(row, default):
    """Those of p1_infer.sh that draw as a row of pareto's: its weight, and those settings that are not the default's."""
    told = {name: " ".join(f"{part:g}" for part in (value if isinstance(value, list) else [value])) for name, value in row.items()
            if name == "guidance_weight" or (name in ("guidance_interval", "guidance_parallel", "num_steps") and value != default[name])}
    return " ".join(f"--{name.removeprefix('num_').replace('_', '-')} {value}" for name, value in told.items())


def p1_tables(results):
    """{page: [tables]} of P1: default and student, the settings of the bundled network, all other trials."""
    p1, pareto, trials = (results[name] for name in ("p1_benchmark", "p1_pareto", "p1_trials"))
    head, unflagged = ["accuracy, %", "second judges, %", "Fréchet", "coverage"], pareto["default"]
    seeds = f"mean of seeds 0 to {len(p1['seeds']) - 1}"
    default = [[seeds, "evaluations", *head], ["the default", str(pareto_evaluations(pareto)), *scores(p1["seeds"])],
               [f"`--student`, w {p1['student'][0]['guidance_weight']:g} (its default)", str(p1["student"][0]["num_steps"]), *scores(p1["student"])],
               *([f"`{row['flags']}`", "1", *scores(row)] for row in trials["rows"] if "--student" in row["flags"])]
    settings = [["seed 0, by `python -m p1_cfg_ddpm.pareto`", "evaluations", *head]]
    for row in pareto["rows"]:
        if row["seed"] == pareto["seeds"][0]:
            name = f"autoguidance, w {row['guidance_weight']:g}" if row["guide"] else f"`{flags(row, unflagged)}`"
            settings.append([name, str(row["evaluations"]), *scores(row)])
    for name, many in (("all_seeds", pareto["seeds"]), ("fresh", pareto["fresh_seeds"])):
        settings += [[f"`{flags(row, unflagged)}`, mean of seeds {many[0]} to {many[-1]}", str(row["evaluations"]), *scores(row)] for row in pareto[name]]
    others = [["trial", "flags", *head, ""]]
    others += [[row["trial"], f"`{row['flags']}`" if row["flags"] else "", *scores(row), row["verdict"]] for row in trials["rows"]
               if "--student" not in row["flags"]]
    return {"p1_cfg_ddpm/README.md": [lines_of(rows) for rows in (default, settings, others)]}


def pareto_evaluations(pareto):
    """Of the default, an image."""
    return next(row["evaluations"] for row in pareto["rows"] if all(row[name] == value for name, value in pareto["default"].items() if name != "seed"))


def lines_of(rows):
    """Rows of cells, the first of which is the head, as a table in Markdown."""
    head, *rest = (f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def main():
    results = {path.stem: read_json(path) for path in RESULTS.glob("*.json")}
    print(table(results))
    for page, tables in p1_tables(results).items():
        print(f"\n{page}:\n", *tables, sep="\n\n")
    for page, text in limits(results).items():
        print(f"\n{page}: {text}")


if __name__ == "__main__":
    run(main)
