"""README's table of results, P1's tables of what helped, P2's of samplers, and the other pages' sentences with numbers, from the JSON that the benchmarks, the
report and the trials wrote.

    python scripts/results.py        # prints them
"""

from statistics import fmean

from common import ROOT, fail, read_json, run

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

    def measured(some, unit, plain, name=""):  # (which ways, their numbers); without bf16 where a machine is slow in it, which is not measured there
        named = {plain: f"{name}{plain}, fp32", "here": f"{name}this project, fp32", "bf16": f"{name}this project, bf16"}
        there = {label: some[way][unit] for label, way in named.items() if way in some}
        return "; ".join(there), "; ".join(f"{number:.0f}" for number in there.values())

    face_ways, face_seconds = measured(ways, "seconds_per_image", "plain loop")
    clip_ways, clip_rates = measured(speed, "pictures_per_second", "plain open_clip", "ViT-B/32, ")
    learning = {name: [speed.get(f"textual inversion, {way}, {name}") for way in ("this project", "straightforward")] for name in ("fp32", "bf16")}
    faster = {name: here["steps_per_second"] / plain["steps_per_second"] for name, (here, plain) in learning.items() if here and plain}
    return [
        ("P1: right among 1,000 digits, MNIST-M; SVHN (five seeds)", f"{mean(seeds, 'mnistm'):.1%}; {mean(seeds, 'svhn'):.1%}", "p1_benchmark.sh"),
        ("P1: the student of one evaluation, likewise", f"{mean(student, 'mnistm'):.1%}; {mean(student, 'svhn'):.1%}", "p1_benchmark.sh"),
        ("P1: likewise, a GPU's default: seeds 0 to 4; 5 to 9",
         "; ".join(f"{row['mnistm']['accuracy']:.1%}, {row['svhn']['accuracy']:.1%}" for row in results["p1_trials"]["rows"] if row["flags"] == "--tries 4"),
         "p1_infer.sh OUT --tries 4"),
        ("P1: Fréchet distance to real digits (1: as good as real ones)",
         f"{mean(seeds, 'mnistm', 'frechet'):.1f}; {mean(seeds, 'svhn', 'frechet'):.1f}", "p1_benchmark.sh"),
        (f"P1: seconds for 1,000, {p1['dtype'].replace('bfloat16', 'bf16').replace('float', 'fp')}; by the student",
         f"{seconds(seeds):.0f}; {seconds(student):.1f}", "p1_benchmark.sh"),
        ("P2: squared error to diffusers' references (limit 20)", f"{p2['miniature_mse']['fp32']:.4f}", "p2_benchmark.sh"),
        (f"P2: seconds a 256x256 face, full size: {face_ways}", face_seconds, "p2_benchmark.sh"),
        ("P2: picture to noise and back, squared error", f"{there:.2f}", "-m p2_ddim.edit measure"),
        ("P2: Fréchet distance of the miniature's faces (1: as drawn ones): `exact`; `good`",
         "; ".join(f"{faces[quality]['frechet']['ratio']:.1f}" for quality in ("exact", "good")), "-m p2_ddim.quality"),
        ("P3: zero-shot top-1 of 50 unseen-style classes", f"{zero_shot['top1']:.1%}", "report.sh --only zero-shot"),
        ("P3: CLIP score: a learned word; initial words; real", "; ".join(f"{word[way]['image']:.0f}" for way in ("learned", "initial", "real")),
         "-m p3_clip_textual_inversion.miniature.words"),
        ("P3: named right (1: as real ones): one; two in place", f"{single['over_real']:.2f}; {pair['over_real']:.2f}",
         "-m p3_clip_textual_inversion.miniature.scores"),
        (f"P3: pictures a second, ViT-B/32: {clip_ways}", clip_rates, "p3_benchmark.sh"),
        (f"P3: learning, times a straightforward loop: {'; '.join(faster)}", "; ".join(f"{times:.2f}" for times in faster.values()), "p3_benchmark.sh"),
    ]


def table(results):
    machine = results["p1_benchmark"]["machine"]
    place = machine["device"] if machine.get("kind") == "cuda" else f"{machine['threads']} cores of an {machine['device']}"
    lines = [f"| times: {place} | measured | by |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {what} | {number} | `{command}` |" for what, number, command in rows(results)])


def sentences(results):
    """{page: [its sentences with numbers]}, each as it stands there but for line breaks."""
    p1, single = results["p1_benchmark"], results["p3_miniature"]["one subject"]["clip"]
    zero_shot, several, faces = results["p3_zero_shot"], results["p3_several"], results["p2_quality"]
    exact = faces["exact"]

    def span(name, kind="seeds"):
        """The least and the most over the seeds, MNIST-M; SVHN."""
        return "; ".join("{:.2f} to {:.2f}".format(*(pick(row[domain][name] for row in p1[kind]) for pick in (min, max))) for domain in ("mnistm", "svhn"))

    pareto = results["p1_pareto"]
    every = [row for row in pareto["rows"] if all(row[name] == value for name, value in pareto["default"].items() if name != "seed")]

    def spread(domain, name, form):
        values = [row[domain][name] for row in every]
        return f"{min(values):{form}} to {max(values):{form}}"

    return {
        "p3_clip_textual_inversion/README.md": p3_sentences(results),
        "p2_ddim/README.md": [
            f"a Fréchet distance of {faces['good']['frechet']['ratio']:.1f} and {faces['draft']['frechet']['ratio']:.1f} times that of drawn ones, "
            f"`exact` {exact['frechet']['ratio']:.1f}"],
        "p1_cfg_ddpm/weights/README.md": [
            f"Measured over {len(p1['seeds'])} seeds of 1,000 digits (MNIST-M; SVHN), as many real digits = 1: coverage {span('coverage')}, "
            f"Fréchet distance {span('frechet')}; by the student {span('coverage', 'student')} and {span('frechet', 'student')}. "
            f"Of the digit that is read worst, the share that is read right: {span('worst_digit')}."],
        "p1_cfg_ddpm/TRIALS.md": [
            f"Seeds alone move the default's rows: over {len(every)} of them SVHN's accuracy is {spread('svhn', 'accuracy', '.1%')}, its distance "
            f"{spread('svhn', 'frechet', '.2f')}, MNIST-M's {spread('mnistm', 'accuracy', '.1%')} and {spread('mnistm', 'frechet', '.2f')}."],
        "hw2_data/mini/README.md": [
            f"Measured: CLIP names {zero_shot['top1']:.1%} of {zero_shot['images']} pictures of the unseen style, and is surer of its answers "
            f"than they are right by {zero_shot['ece']:.0%} (expected calibration error); it takes {single['drawn']['share']:.1%} of Stable Diffusion's "
            f"guided pictures for what they are, {single['real']['share']:.1%} of real drawings of the same things; "
            f"with regions two known things are both found in {several['known']['words, regions']['both']:.0%} of pictures, "
            f"two learned apart in {several['methods']['words learned apart, regions']['a <new1> next to a <new3>']['both']:.0%}. "
            f"{faces['count']} faces by the course's convention: Fréchet distance {exact['frechet']['ratio']:.1f}, energy of high frequencies "
            f"{exact['high_frequency']['ratio']:.2f} (as many drawn ones = 1), grain of {exact['grain']['generated']:.1f} grey levels in flat places."],
    }


def p3_sentences(results):
    words, lora, several, together, both = (results[f"p3_{name}"] for name in ("words", "lora", "several", "together", "both"))
    bundled, others, unseen = words["bundled"]["concepts"], words["instances, seed 2"], words["unseen, seed 2"]
    best = fmean(row["best words"]["share_of_the_way"] for row in others["concepts"].values())
    subject, style, penguin = (bundled[f"<new{i}>"]["learned"]["share_of_the_way"] for i in (1, 2, 4))
    rest = min(row["rest"]["lowest"] / row["rest"]["initial"] for row in results["p3_compare"]["summary"])
    low, lower = (words[f"a kind never seen, with weights of low rank{seed}"]["concepts"]["<new4>"]["learned"] for seed in ("", ", another seed"))
    moved = lora["drift"]["learned (runs/lora)"]["<new4>"]["grey_levels"]
    pair, apart, known = "a <new1> next to a <new3>", "words learned apart", several["known"]
    two, three = (together[size]["ways"] for size in ("two", "three"))
    names = [way["known"]["share"] for way in (two["words"], two["boxes by the prompt"], three["words"], three["boxes given"])]
    dream = results["p3_dreambench"]["summary"]["subjects"]
    learned, name, real = dream["learned words"], dream["class names, nothing learned"], dream["real pictures"]
    return [
        f"On the miniature: {subject:.2f} for the shipped subject, {style:.2f} for the style; for {len(others['concepts'])} others, drawn by a seed that chose "
        f"nothing, {others['mean']:.2f} in the mean and {others['least']:.2f} the least (the best words: {best:.2f} in the mean); for known kinds in a style "
        f"never seen {unseen['mean']:.2f}, the least {unseen['least']:.2f}; for a penguin, a kind never seen, {penguin:.2f}. The rest of a prompt keeps "
        f"{rest:.0%} of the initial words' score at least.",
        f"On the miniature the penguin comes {low['share_of_the_way']:.2f} and {lower['share_of_the_way']:.2f} of the way on two seeds (by the word alone "
        f"{penguin:.2f}); beside an apple it is found in {low['both_beside']['share']:.0%} and {lower['both_beside']['share']:.0%}.",
        f"Programs that leave them in the model move the prompts that held them by {moved:.1f} grey levels.",
        f"On the miniature two known things are both found in {known['words, regions']['both']:.0%} of pictures ({known['words']['both']:.0%} without boxes), "
        f"two words learned apart in {several['methods'][f'{apart}, regions'][pair]['both']:.0%} ({several['methods'][apart][pair]['both']:.0%}), in "
        f"{known['times']:.2f} times the time.",
        f"two are there in {two['boxes by the prompt']['learned']['share']:.0%} with boxes by the prompt's words, {two['words']['learned']['share']:.0%} "
        f"without, three in {three['boxes given']['learned']['share']:.0%} with boxes given, {three['words']['learned']['share']:.0%} without; known words in "
        f"{min(names):.0%} to {max(names):.0%}.",
        f"on classes that set nothing, {both['accepted']['share']:.0%} of real compositions are taken, and {both['wrongly_accepted']['share']:.1%} of pictures "
        f"that lack one or blend both.",
        f"learned words have a CLIP-I of {learned['clip_i']['mean']:.3f} where the class's name has {name['clip_i']['mean']:.3f} and real pictures "
        f"{real['clip_i']['mean']:.3f}, and a CLIP-T of {learned['clip_t']['mean']:.3f} where it has {name['clip_t']['mean']:.3f}",
    ]


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
    """Of P1's pages: default and student; the settings of the bundled network; all other trials."""
    p1, pareto, trials = (results[name] for name in ("p1_benchmark", "p1_pareto", "p1_trials"))
    head, unflagged = ["accuracy, %", "second judges, %", "Fréchet", "coverage"], pareto["default"]
    seeds = f"mean of seeds 0 to {len(p1['seeds']) - 1}"
    default = [[seeds, "evaluations", *head], ["the default", str(pareto_evaluations(pareto)), *scores(p1["seeds"])],
               [f"`--student`, w {p1['student'][0]['guidance_weight']:g} (its default)", str(p1["student"][0]["num_steps"]), *scores(p1["student"])],
               *([f"`{row['flags']}`, seeds {row['seeds'][0]} to {row['seeds'][-1]}", f"{row['evaluations']:.0f}", *scores(row)] for row in trials["rows"]
                 if "--tries" in row["flags"]),
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
               if "--student" not in row["flags"] and "--tries" not in row["flags"]]
    return [lines_of(rows) for rows in (default, settings, others)]


def pareto_evaluations(pareto):
    """Of the default, an image."""
    return next(row["evaluations"] for row in pareto["rows"] if all(row[name] == value for name, value in pareto["default"].items() if name != "seed"))


def p2_table(results):
    """Of P2's page: how far each sampler is from the answer of very many steps."""
    measured, rows = results["p2_samplers"]["distance"], {}
    for row in measured["rows"]:
        if row["spacing"] == "trailing":
            rows.setdefault(row["sampler"], []).append(row)
    asked = [row["asked"] for row in next(iter(rows.values()))]
    head = [f"grey levels from the answer of {measured['truth_steps']:,} steps, no clamp, {measured['faces']} faces"]
    head += [f"{asked[0]} evaluations", *map(str, asked[1:])]
    names = {"heun": f"heun ({', '.join(str(row['evaluations']) for row in rows['heun'])})", "unipc": "**unipc**"}
    return lines_of([head, *([names.get(sampler, sampler), *(f"{row['value']:.1f}" for row in some)] for sampler, some in rows.items())])


def tables(results):
    """{page: [its tables]}"""
    default, *trials = p1_tables(results)
    return {"p1_cfg_ddpm/README.md": [default], "p1_cfg_ddpm/TRIALS.md": trials, "p2_ddim/README.md": [p2_table(results)]}


def lines_of(rows):
    """Rows of cells, the first of which is the head, as a table in Markdown."""
    head, *rest = (f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *rest])


def main():
    results = {path.stem: read_json(path) for path in RESULTS.glob("*.json")}
    try:
        print(table(results))
        for page, some in [*tables(results).items(), *sentences(results).items()]:
            print(f"\n{page}:", *some, sep="\n\n")
    except (LookupError, TypeError) as error:
        fail(f"{RESULTS} lacks {error}: a .json is not there, or not what its script wrote")


if __name__ == "__main__":
    run(main)
