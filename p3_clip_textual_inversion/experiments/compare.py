"""What learning a word is worth: the same prompts and noises with the learned word, with the words it started from, and with untrained words.

    bash scripts/p3_train.sh --output runs/p3        # likewise with --seed 1 --output runs/p3_seed1, and 2
    python -m p3_clip_textual_inversion.experiments.compare --learned runs/p3 runs/p3_seed1 runs/p3_seed2

writes report/results/p3_compare.json and figures/p3_compare.png; for another model than the miniature, into the folder report of the first words.

Image and text scores are those of the course's grader, averaged over all pictures of a prompt (not only the best five); the rest score is a text score too,
of the prompt without the learned word, such as "a drawing of on a blue background": whether the rest of the prompt is still obeyed.

Words are drawn with the weights of low rank beside them (lora.py), if there are any; then it is told as well how far ordinary prompts' pictures move where
such weights stay in the model, as in other programs: the mean difference in grey levels, of things that no prior shows.

--write-baselines sets INPUT_JSON's pass marks: in the image score what the initial words' best pictures get, since a learned word must do better; in the
text score nine tenths of what they get, or of what the examples get, if that is less: no picture of the concept could be asked for more.
"""

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..concepts import read_concepts
from ..custom_diffusion import tell_projections
from ..data import example_pictures
from ..defaults import MINIATURE, input_of, report_of
from ..device import free_memory, progress
from ..embedding import add_words, expand, initial_rows, note_models
from ..evaluate import add_judge_arguments, best_of, clip_scores, judge_of
from ..files import check_flags, fingerprint, lock, note, read_json, run, writable_file, writable_folder, write_json
from ..formats.words import gather
from ..inference import add_arguments, generate, load, settings_of
from ..lora import add_loras, find_loras, loras_of
from ..measures import drift
from ..model import MINI_SD
from ..pictures import save_image, sheet
from ..provenance import HelpFormatter


def rest_of(prompt, token):
    """The prompt without the learned word and its article."""
    return " ".join(re.sub(rf"(\b(an?|the) )?{re.escape(token)}", "", prompt).split())


def score_way(checkpoint, concepts, vectors, count, config, device, grader, references, bar, loras=None):
    """[(image scores, text scores, rest scores, pictures)] per prompt, the concepts' words standing for `vectors`; None for src_image itself.

    loras: {word: file} of the weights beside them"""
    parts = load(checkpoint, device, config)
    if vectors:
        add_words(parts, vectors)
    added = add_loras(parts, loras or {}, 1.0)
    counts = {word: len(rows) for word, rows in (vectors or {}).items()}
    results = []
    for concept in concepts:
        directions = grader.of_texts(concept.eval_prompts)
        added.use({concept.token}.intersection(loras or ()))
        for k, prompt in enumerate(concept.prompts):
            text = expand(prompt, counts) if vectors else prompt.replace(concept.token, concept.src_image)
            names = [f"{concept.token}/{prompt}/{i}" for i in range(count)]  # the same noises for every way
            pictures = [Image.fromarray(picture) for picture in generate(parts, [text] * count, names, config, progress=bar)]
            features = grader.of_pictures(pictures)
            rest = 100 * features @ grader.of_texts([rest_of(prompt, concept.token)])[0]
            results.append((*clip_scores(features, references[concept.number], directions[k]), rest, pictures))
    return results


def summary_of(prompt, rows):
    """The scores of one prompt in one row: with the initial words, and the mean and range of the untrained words and of the seeds. rows: {way: scores}"""
    summary = {"prompt": prompt}
    for what in ("image", "text", "rest"):
        summary[what] = {"initial": rows["initial words"][what]}
        for kind, lowest, highest in (("untrained", "untrained_lowest", "untrained_highest"), ("learned", "lowest", "highest")):
            values = [row[what] for way, row in rows.items() if way.startswith(kind)]
            summary[what] |= {kind: float(np.mean(values)), lowest: min(values), highest: max(values)}
    return summary


def drifts_of(checkpoint, row, loras, config, device, grader):
    """{way: {words: `drift` of the ordinary prompts where the weights of these words stay in the model}}: of each word, and of all together.

    loras: {way: {word: file}}"""
    parts, prompts = load(checkpoint, device, config), [row.templates["object"][-1].format(word) for word in row.several.moved]
    originals, moved = list(generate(parts, prompts, prompts, config)), {}
    for way, files in loras.items():
        added, moved[way], prints = add_loras(parts, files, 1.0), {}, {word: fingerprint(file) for word, file in files.items()}
        for words in dict.fromkeys([*((word,) for word in files), tuple(files)]):
            added.use(loras_of(" ".join(words), files, prints))
            moved[way][" + ".join(words)] = drift(list(generate(parts, prompts, prompts, config)), originals, grader)
        added.use(())
    return moved


def main():
    parser = argparse.ArgumentParser(description="Compares learned words with the words they started from and with untrained ones.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--learned", type=Path, nargs="+", required=True, help="folders of embeddings, one for each seed of the training")
    parser.add_argument("--input", type=Path, default=None, help="the concepts (default: the model's, see defaults.py)")
    parser.add_argument("--checkpoint", default=str(MINI_SD), help="sd-v1-4.ckpt, another file of its layout, a diffusers folder or a hub name")
    add_judge_arguments(parser)
    parser.add_argument("--num-images", type=int, default=25, help="pictures per prompt and way")
    parser.add_argument("--output", type=Path, default=None, help="folder for results/p3_compare.json and figures/p3_compare.png (default: the project's "
                        "report for the miniature's own concepts, otherwise the folder report in the first one of --learned)")
    parser.add_argument("--write-baselines", action="store_true", help="write the pass mark of each prompt into INPUT_JSON")
    add_arguments(parser)
    args = parser.parse_args()
    config, device, row, model = settings_of(args)
    args.input = input_of(args.input, row.input)
    args.output = report_of(args.output, args.input, MINIATURE.input, args.checkpoint, MINI_SD, args.learned[0])
    check_flags(args, ("num_images",), lambda value: 1 <= value <= 10**6, "between 1 and 1000000")
    concepts = read_concepts(args.input)
    found = [gather([folder], [concept.token for concept in concepts]) for folder in args.learned]
    learned = [vectors for vectors, *_ in found]
    for *_, origin in found:
        tell_projections(None, origin)
        note_models(origin, model)
        for word, init in ((word, metadata["init"]) for word, (_, metadata) in origin.items() if metadata.get("init", "src_image") != "src_image"):
            note(f"{word} was learned from {init!r} (--init); its row of initial words is of src_image all the same")
    args.loras = {f"learned ({folder})": files for folder, (*_, origin) in zip(args.learned, found) if (files := find_loras((), origin))}
    for name in ("results", "figures"):
        writable_folder(args.output / name)
    examples = {concept.number: example_pictures(concept.folder) for concept in concepts}
    if args.write_baselines:
        writable_file(args.input)
    with lock(args.output, "-p3_compare"):
        compare(args, config, device, row, model, concepts, learned, examples)


def compare(args, config, device, row, model, concepts, learned, examples):
    """learned: [{word: rows}], one for each seed; examples: {concept's number: its pictures}."""
    grader = judge_of(row, args, device=device)
    references = {number: grader.of_pictures(pictures) for number, pictures in examples.items()}
    parts, generator = load(args.checkpoint, device, config), torch.Generator().manual_seed(args.seed)
    untrained = [{c.token: initial_rows(parts, None, len(vectors[c.token]), generator) for c in concepts} for vectors in learned]
    del parts  # a card has no place for it beside those that draw
    free_memory()
    ways = {"initial words": None, **{f"untrained ({i})": vectors for i, vectors in enumerate(untrained)},
            **{f"learned ({folder})": {c.token: vectors[c.token] for c in concepts} for folder, vectors in zip(args.learned, learned)}}
    prompts = [(concept, k) for concept in concepts for k in range(len(concept.prompts))]
    scores, pictures, marks = {}, {}, []
    with progress(total=len(ways) * len(prompts) * args.num_images, unit="picture", desc="drawing") as bar:
        for way, vectors in ways.items():
            results = score_way(args.checkpoint, concepts, vectors, args.num_images, config, device, grader, references, bar, args.loras.get(way))
            scores[way] = [{"prompt": concept.prompts[k], "image": image.mean().item(), "image_deviation": image.std().item(), "text": text.mean().item(),
                            "rest": rest.mean().item()} for (concept, k), (image, text, rest, _) in zip(prompts, results)]
            pictures[way] = [shown[:5] for *_, shown in results]
            if way == "initial words":
                marks = [best_of(image, text)[1:] for image, text, *_ in results]
    among = {number: float((100 * features @ features.T)[~torch.eye(len(features), dtype=torch.bool)].mean()) if len(features) > 1 else None
             for number, features in references.items()}
    summary = [summary_of(concept.prompts[k], {way: rows[j] for way, rows in scores.items()}) for j, (concept, k) in enumerate(prompts)]
    results = {"summary": summary, "ways": scores, "examples_among_themselves": among, "pictures": args.num_images,
               "guidance_weight": config.guidance_weight, "steps": config.num_steps, "seed": config.seed, "model": model,
               "judge": Path(args.model or row.judge).name}
    if args.loras:
        results["drift"] = drifts_of(args.checkpoint, row, args.loras, config, device, grader)
    write_json(args.output / "results" / "p3_compare.json", results)
    if args.write_baselines:
        content = read_json(args.input)
        for own in concepts:
            of_examples = (100 * references[own.number] @ grader.of_texts(own.eval_prompts).T).mean(0).tolist()  # by prompt
            content[own.number]["baseline"] = [[round(image, 2), round(0.9 * min(text, of_examples[k]), 2)]
                                               for (concept, k), (image, text) in zip(prompts, marks) if concept is own]
        write_json(args.input, content)
    rows = []
    for j, (concept, k) in enumerate(prompts):
        if k == 0:
            rows.append((f"examples of {concept.token}", examples[concept.number]))
        shown = ("initial words", "untrained (0)", f"learned ({args.learned[0]})")
        rows += [(f"{concept.prompts[k]}: {way.split(' (')[0]}", pictures[way][j]) for way in shown]
        print(concept.prompts[k])
        for what in ("image", "text", "rest"):
            score = summary[j][what]
            print(f"  {what:5} score: initial words {score['initial']:.1f}, "
                  f"untrained {score['untrained']:.1f} ({score['untrained_lowest']:.1f} to {score['untrained_highest']:.1f}), "
                  f"learned {score['learned']:.1f} ({score['lowest']:.1f} to {score['highest']:.1f})")
    for way, moved in results.get("drift", {}).items():
        levels = ", ".join(f"{words} {value['grey_levels']:.1f}" for words, value in moved.items())
        print(f"ordinary prompts with the weights of {way} in the model: moved by {levels} grey levels")
    save_image(sheet([row[:5] for _, row in rows], titles=[title for title, _ in rows], side=96), args.output / "figures" / "p3_compare.png")
    print(f"wrote results/p3_compare.json and figures/p3_compare.png to {args.output}")


if __name__ == "__main__":
    run(main)
