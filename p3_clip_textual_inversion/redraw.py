"""Draws a picture of a prompt again from what its PNG tells: settings, seed, model and words, in the batch that it was drawn in.

    python -m p3_clip_textual_inversion.redraw OUT/0/0/source0_prompt0_3.png
"""

from dataclasses import replace
from pathlib import Path

from .defaults import row_of
from .embedding import expand, installed_folder, model_name
from .files import UserError, fingerprint, note, run
from .formats.identity import identify, weights_fingerprint
from .formats.words import gather, own_words
from .inference import DrawConfig, expanded, generate, load_with_words, noise_name
from .lora import add_loras
from .model import MINI_SD
from .provenance import redraw
from .regions import plans_of
from .tensors import tensor_fingerprint


def draw(made, name, batch, where, args):
    """uint8 [H, W, 3] of the picture `name`, drawn with the others of its batch."""
    checkpoint = args.checkpoint or where.get("checkpoint", str(MINI_SD))
    identity = identify(checkpoint)
    model = made["made_of"]["model"]
    if (model_name(row_of(identity.side), identity), weights_fingerprint(checkpoint)) != (model, made["made_of"].get("weights")):
        if not args.checkpoint and "checkpoint" not in where:
            raise UserError(f"{args.picture} was drawn by the model {model}, and its folder's record, which tells where that is, is not there; "
                            "give it by --checkpoint")
        note(f"{checkpoint} is another model than the one that drew {args.picture}")
    config = DrawConfig.of_told(made["settings"], len(batch))
    wanted = {word: print_ for own in batch.values() for word, print_ in own["words"].items()}
    sources = args.embeddings or where.get("words", str(installed_folder(model)))
    own = {word: rows for word, rows in own_words(checkpoint).items() if word in wanted}
    sources = [source for source in ([sources] if isinstance(sources, str) else sources) if str(source) != str(checkpoint)]
    needed, vectors, initials = [word for word in wanted if word not in own], {}, {}
    if sources:
        vectors, initials, _ = gather(sources, needed, list(wanted), identity.width, model, tell_others=False)
    vectors = own | vectors
    for word, rows in vectors.items():
        if tensor_fingerprint(rows) != wanted[word].rpartition("+")[2]:
            note(f"the word {word} of {', '.join(map(str, sources))} is another one than that of {args.picture}")
    projections = None
    if "projections" in made["made_of"]:
        projections = Path(where.get("projections", "projections.safetensors"))
        if not projections.is_file():
            raise UserError(f"the projections {projections} are no longer there")
        if fingerprint(projections) != made["made_of"]["projections"]:
            note(f"{projections} are others than those of {args.picture}")
    parts = load_with_words(checkpoint, args.device, config, vectors, projections, initials)
    if batch[name].get("lora"):
        put_loras(parts, batch[name]["lora"], where.get("lora", {}), args.picture)
        batch = {other: own for other, own in batch.items() if own.get("lora") == batch[name]["lora"]}
    prompts, counts = expanded(batch, batch, vectors), {word: len(rows) for word, rows in vectors.items()}
    plans, config = plans_of(prompts, config, counts), replace(config, negative_prompt=expand(config.negative_prompt, counts))
    pictures = generate(parts, prompts, [noise_name(own) for own in batch.values()], config, plans)
    return dict(zip(batch, pictures))[name]


def put_loras(parts, wanted, files, picture):
    """Puts the weights of low rank of a picture into the model. wanted: {name: scale x fingerprint}; files: {name: path}"""
    paths = {name: Path(files.get(name, f"{name}_lora.safetensors")) for name in wanted}
    for name, path in paths.items():
        scale, print_ = wanted[name].split(" x ")
        if not path.is_file():
            raise UserError(f"the LoRA {path} is no longer there")
        if fingerprint(path) != print_:
            note(f"{path} are other weights than those of {picture}")
    add_loras(parts, paths, float(scale)).use(wanted)


def main():
    redraw("p3_clip_textual_inversion.inference", draw, __doc__.splitlines()[0],
           {"--embeddings": {"default": None, "metavar": "WORDS", "help": "the folder of its words, or a file, where they no longer lie where they were "
                             "(default: as recorded; without the folder's record, the installed ones)"}})


if __name__ == "__main__":
    run(main)
