"""What learning a word is worth on the miniature: for concepts drawn by seed, the learned word between the words it began with and real compositions.

    python -m p3_clip_textual_inversion.miniature.words --drawings runs/emoji.npz --output runs/words --seed 1 --kind instances

Each concept is a known kind with looks that no one word tells (instances), or a known kind in a style that nothing was trained on (unseen). Its five examples
are made, its word is learned by `train` (flags behind -- go there), and pictures are drawn of the initial words, of the words that tell all looks (the best
that words can do) and of the learned word, with the same noises. Scores are CLIP's: the mean cosine with real drawings of the concept.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from ..device import DTYPES, pick_device, pick_dtype
from ..embedding import add_words, expand
from ..files import MINI, RESULTS, UserError, check_flags, lock, read_json, run, writable_folder, write_json
from ..formats.words import gather
from ..guard import command as command_of
from ..inference import DrawConfig
from ..lora import add_loras, find_loras
from ..measures import share
from ..model import MINI_SD, load_stable_diffusion
from ..pictures import save_image
from ..provenance import HelpFormatter, command_line
from .drawings import CONCEPTS, UNKNOWN, Look, write_concepts, write_examples
from .scores import GUIDANCE, Artist, Eye, grid, halves
from .world import COLOURS, DRAWINGS, GROUNDS, PATTERNS, STYLES, UNSEEN_STYLE, Drawings, make_scenes, words

PROMPTS = ("a drawing of a {} on a blue background", "a {} next to a red apple")
BESIDE = "red-apple"
LOOKALIKES = 20


def looks_of(kind, drawings, seed, count):
    """`Look`s drawn by seed, none of a bundled concept's kind."""
    rng = np.random.default_rng(seed)
    taken = {look.name for look in CONCEPTS} | {BESIDE}
    names = [name for i in drawings.everyday.tolist() if (name := drawings.names[i]) not in taken and not drawings.coloured[i]]
    looks = []
    for i, name in enumerate(rng.permutation(names)[:count].tolist()):
        how = [str(rng.choice(list(table))) for table in (STYLES, COLOURS, PATTERNS)]
        looks.append(Look(str(i), f"<s{seed}k{i}>", words(name), PROMPTS, name, *((UNSEEN_STYLE,) if kind == "unseen" else how)))
    return looks


def styles():
    """The sets that Stable Diffusion has not seen, as styles to learn."""
    return [CONCEPTS[1], Look("noto", "<noto>", "noto", CONCEPTS[1].prompts, None, UNSEEN_STYLE)]


def entries_of(look, ground=None, beside=False, count=1):
    """Real compositions of a concept, alone or with the other thing on its right, as world.make_scenes wants them."""
    grounds = list(GROUNDS)
    own = {"style": look.style, "hues": [look.hue], "patterns": [look.pattern], "names": [look.name, BESIDE] if beside else [look.name]}
    return [own | {"ground": ground or grounds[i % len(grounds)]} for i in range(count)]


def lookalikes(look):
    """The concept first, then others of its kind with other looks."""
    others = [(hue, pattern) for hue in (None, *COLOURS) for pattern in (None, *PATTERNS) if (hue, pattern) != (look.hue, look.pattern)]
    order = np.random.default_rng(0).permutation(len(others))[:LOOKALIKES - 1]
    return [look, *(Look(look.number, look.token, look.start, look.prompts, look.name, look.style, *others[i]) for i in order)]


def told(look):
    """The words that tell all looks."""
    return " ".join(word for word in (look.pattern, look.hue, look.start) if word) + (f" in the style of {words(look.style)}" if look.hue is None else "")


def measure(artist, eye, look, learned, counts, count):
    """Scores of one concept, {way: {...}}, and the first of its pictures alone, [pictures of a way, ...]. learned: an `Artist` with the word."""
    drawings = artist.drawings

    def real(entries, seed):
        return artist.real(make_scenes(drawings, entries), seed)

    references = eye.of_pictures(real(entries_of(look, count=24), 1))
    of_looks = torch.stack([eye.of_pictures(real(entries_of(other, count=24), 2)).mean(0) for other in lookalikes(look)])
    names = [drawings.names[i] for i in drawings.everyday.tolist()]
    rest = eye.of_texts(["a drawing of on a blue background", "next to a red apple"])
    alone = {"real": real(entries_of(look, "blue", count=count), 3)}
    beside = {"real": real(entries_of(look, beside=True, count=count), 4)}
    for way, painter, word in (("initial", artist, look.start), ("best words", artist, told(look)), ("learned", learned, expand(look.token, counts))):
        for pictures, prompt in zip((alone, beside), PROMPTS):
            pictures[way] = painter.drawn([prompt.format(word)] * count, [f"{prompt}/{i}" for i in range(count)])
    rows = {}
    for way, pictures in alone.items():
        features, (left, right) = eye.of_pictures(pictures), halves(beside[way])
        own = (eye.of_pictures(left) @ of_looks.T).argmax(1) == 0
        apple = eye.names(right, names) == names.index(BESIDE)
        rows[way] = {"image": 100 * (features @ references.T).mean().item(), "rest": [100 * (f @ text).mean().item() for f, text in
                                                                                       zip((features, eye.of_pictures(beside[way])), rest)],
                     "nearest_of_20": share((features @ of_looks.T).argmax(1) == 0), "own_beside": share(own), "apple_beside": share(apple),
                     "both_beside": share(own & apple)}
    gap = rows["real"]["image"] - rows["initial"]["image"]
    for way in ("best words", "learned"):
        rows[way]["share_of_the_way"] = (rows[way]["image"] - rows["initial"]["image"]) / gap
    return rows, [pictures[:8] for pictures in alone.values()]


def measure_style(artist, eye, look, learned, counts, count):
    """The same for a style, on its two prompts' subjects; references are real drawings of the subject in the style."""
    drawings, rows, shown = artist.drawings, {}, []
    for prompt in look.prompts:
        name = next(drawings.names[i] for i in drawings.everyday.tolist() if words(drawings.names[i]) in prompt)
        entries = entries_of(Look(look.number, look.token, look.start, look.prompts, name, look.style), count=max(24, count))
        references = eye.of_pictures(artist.real(make_scenes(drawings, entries), 1)[:24])
        pictures = {"real": artist.real(make_scenes(drawings, entries), 3)[:count]}
        for way, painter, word in (("initial", artist, look.start), ("learned", learned, expand(look.token, counts))):
            pictures[way] = painter.drawn([prompt.format(word)] * count, [f"{prompt}/{i}" for i in range(count)])
        subject = eye.of_texts([f"a drawing of a {words(name)}"])[0]
        for way, drawn in pictures.items():
            features = eye.of_pictures(drawn)
            rows.setdefault(way, []).append([100 * (features @ references.T).mean().item(), 100 * (features @ subject).mean().item()])
        shown += [drawn[:8] for drawn in pictures.values()]
    image = {way: np.mean([score for score, _ in scores]) for way, scores in rows.items()}
    results = {way: {"image": image[way], "subject": float(np.mean([score for _, score in scores])), "by_prompt": scores} for way, scores in rows.items()}
    results["learned"]["share_of_the_way"] = (image["learned"] - image["initial"]) / (image["real"] - image["initial"])
    return results, shown


def learn(looks, drawings, args, flags):
    """The folder of the words, learned by the command that a user has."""
    folder = writable_folder(args.output / "examples")
    write_examples(drawings, looks, folder, args.seed)
    write_concepts(looks, folder / "input.json")
    command = [*command_of("p3_clip_textual_inversion.train"), folder / "input.json", "--checkpoint", args.sd, "--output", args.output / "words",
               "--sample-every", 0, "--device", args.device, "--dtype", args.dtype, *flags]
    if subprocess.run(list(map(str, command)), check=False).returncode:
        raise UserError("the learning failed")
    return args.output / "words"


def main():
    own, flags = (sys.argv[1:sys.argv.index("--")], sys.argv[sys.argv.index("--") + 1:]) if "--" in sys.argv else (sys.argv[1:], [])
    parser = argparse.ArgumentParser(description="Learns words of concepts drawn by seed; scores them.", formatter_class=HelpFormatter)
    parser.add_argument("--drawings", type=Path, default=DRAWINGS, metavar="NPZ", help="file that miniature.drawings render wrote")
    parser.add_argument("--output", type=Path, default=None, help="folder for examples, words, scores.json and pictures.png (default: runs/words_KIND_SEED)")
    parser.add_argument("--report", metavar="NAME", default=None, help="keep the scores under this name in report/results/p3_words.json, too")
    parser.add_argument("--kind", choices=["instances", "unseen", "styles", "bundled", "unknown"], default="instances",
                        help="what to learn: see above; the two styles that nothing was trained on; the bundled concepts; of which the kind never seen")
    parser.add_argument("--seed", type=int, default=0, help="of the concepts")
    parser.add_argument("--count", type=int, default=5, help="concepts")
    parser.add_argument("--pictures", type=int, default=50, help="of each way and prompt")
    parser.add_argument("--clip", type=Path, default=MINI / "clip", help="folder of CLIP, the judge")
    parser.add_argument("--sd", type=Path, default=MINI_SD, help="folder of Stable Diffusion")
    parser.add_argument("--guidance-weight", type=float, default=GUIDANCE, help="w of the guidance")
    parser.add_argument("--batch-size", type=int, default=8, help="pictures at a time")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="auto", help="number format of the UNet")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    args = parser.parse_args(own)
    check_flags(args, ("count", "pictures", "batch_size"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("seed",), lambda value: value >= 0, "at least 0")
    args.output = args.output or Path("runs") / f"words_{args.kind}_{args.seed}"
    device, drawings = pick_device(args.device), Drawings(args.drawings)
    looks = {"bundled": list(CONCEPTS), "styles": styles(), "unknown": list(UNKNOWN)}.get(args.kind) or looks_of(args.kind, drawings, args.seed, args.count)
    vectors, *_, origin = gather([learn(looks, drawings, args, flags)], [look.token for look in looks])
    eye, counts = Eye(args.clip, device), {word: len(rows) for word, rows in vectors.items()}
    config = DrawConfig(num_steps=25, guidance_weight=args.guidance_weight, batch_size=args.batch_size, dtype=pick_dtype(args.dtype, device))
    plain, taught = (load_stable_diffusion(args.sd, device) for _ in range(2))
    add_words(taught, vectors)
    loras = find_loras((), origin)  # with -- --lora
    added = add_loras(taught, loras, 1.0)
    results, sheets = {}, []
    for look in looks:
        added.use({look.token}.intersection(loras))
        scores = (measure if look.name else measure_style)(Artist(drawings, plain, config), eye, look, Artist(drawings, taught, config), counts, args.pictures)
        results[look.token], learned = {"what": told(look), "style": look.style, **scores[0]}, scores[0]["learned"]
        sheets += scores[1]
        line = f"{look.token} {told(look)}: image " + ", ".join(f"{way} {row['image']:.1f}" for way, row in scores[0].items())
        line += f"; of the way {learned['share_of_the_way']:.2f}"
        if look.name:
            best, real = scores[0]["best words"], scores[0]["real"]
            line += (f" (best words {best['share_of_the_way']:.2f}); nearest of {LOOKALIKES} {learned['nearest_of_20']['share']:.2f}; beside an apple both "
                     f"{learned['both_beside']['share']:.2f}, real {real['both_beside']['share']:.2f}")
        print(line, flush=True)
    ways = [rows["learned"]["share_of_the_way"] for rows in results.values()]
    print(f"of the way: mean {np.mean(ways):.2f}, least {min(ways):.2f}")
    command = command_line("python -m p3_clip_textual_inversion.miniature.words", parser, args, ("output", "report", "drawings", "clip", "sd"))
    scores = {"command": " ".join([command, *(["--", *flags] if flags else [])]),
              "mean": float(np.mean(ways)), "least": min(ways), "concepts": results}
    write_json(args.output / "scores.json", scores)
    if args.report:
        with lock(writable_folder(RESULTS), "-p3_words"):
            path = RESULTS / "p3_words.json"
            write_json(path, (read_json(path) if path.exists() else {}) | {args.report: scores})
    save_image(grid(sheets, 8), args.output / "pictures.png")
    print(f"wrote scores.json and pictures.png to {args.output}")


if __name__ == "__main__":
    run(main)
