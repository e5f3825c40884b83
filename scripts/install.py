"""Copies what was trained to where hw2_1.sh and hw2_3.sh find it unasked: a model of p1_train.sh into p1_cfg_ddpm/weights/, words of p3_train.sh into
p3_clip_textual_inversion/embeddings/{model}/. Git keeps both, so that they can be handed in. What was installed before is kept in a folder `replaced`.
"""

import argparse
import json
import sys
from pathlib import Path

from safetensors import SafetensorError, safe_open

from common import ROOT, fail, run


def is_digit_model(path):
    """Whether a file is a model of P1, which has settings in its header, and not a word of P3, in whichever format."""
    try:
        with safe_open(path, "pt") as file:
            return "config" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def told_of(path):
    """What a model of P1 tells of its training."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["config"]).get("training") or {}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", metavar="PATH",
                        help="a run of p1_train.sh or its model.safetensors, a folder of words of p3_train.sh, or one word")
    parser.add_argument("--checkpoint", default=None, help="the Stable Diffusion that words were learned with, where their files do not tell it")
    args = parser.parse_args()
    for source in args.sources:
        if not source.exists():
            fail(f"no such file or folder: {source}")
        if (source / "model.safetensors").is_file():  # a run of p1_train.sh
            source /= "model.safetensors"
        if (source / "UNet.pt").is_file() or source.name == "UNet.pt":
            fail(f"{source} is a face network of P2, which is not installed: p2_infer.sh and hw2_2.sh take its path")
        if (source / "state.pt").is_file():
            from p3_clip_textual_inversion.embedding import models_of

            if models_of(source.parent):
                fail(f"{source} is one concept's training; give the folder above it, which has the words: {source.parent}")
            fail(f"{source} is a training that has not ended: the command that began it goes on with it")
        if source.is_file() and is_digit_model(source):
            from p1_cfg_ddpm import files, inference

            install, options = inference.install, {}
            told = told_of(source)
            if told.get("of_steps") and told["steps"] < told["of_steps"]:
                print(f"note: {source} is of a training at step {told['steps']} of {told['of_steps']}: the command that began it goes on with it",
                      file=sys.stderr)
        else:
            from p3_clip_textual_inversion import embedding, files
            from p3_clip_textual_inversion.defaults import row_of
            from p3_clip_textual_inversion.formats.identity import identify

            install, options = embedding.install, {}
            if args.checkpoint:
                try:
                    identity = identify(args.checkpoint)
                except files.UserError as error:
                    fail(str(error))
                options["name"] = embedding.model_name(row_of(identity.side), identity)
        try:
            installed = install(source, **options)
        except (files.UserError, OSError) as error:
            fail(str(error))
        for path in installed if isinstance(installed, list) else [installed]:
            print(f"installed {path.relative_to(ROOT) if path.is_relative_to(ROOT) else path}")
    print("git add them to hand them in; scripts/hw2_1.sh and scripts/hw2_3.sh tell which they use (move them away for the bundled ones)")


if __name__ == "__main__":
    run(main)
