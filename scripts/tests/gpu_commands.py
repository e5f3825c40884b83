"""Runs every entry point of the three problems for two steps on a GPU, a real one where there is one, otherwise the simulated one.

    python scripts/tests/gpu_commands.py FOLDER ampere|turing      # with native bf16, or as a card without; writes FOLDER/results.json

All in one process, on inputs that it makes itself: random pictures, untrained models of the real ones' shape, but narrow."""

import contextlib
import io
import json
import os
import re
import runpy
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import numpy as np
import simulated_gpu
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def write_pictures(folder, names, side):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / name)


def make_inputs(folder):
    """Digits in the course's layout, faces, noises, a class folder, two concepts, and an untrained CLIP and Stable Diffusion."""
    import open_clip
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from safetensors.torch import save_file
    from transformers import CLIPTextConfig, CLIPTextModel

    from p3_clip_textual_inversion.clip import make_clip_tokenizer, read_merges

    for domain in ("mnistm", "svhn"):
        write_pictures(folder / "digits" / domain / "data", [f"{i:03d}.png" for i in range(30)], 28)
        for split, rows in (("train", range(20)), ("val", range(20, 30))):
            (folder / "digits" / domain / f"{split}.csv").write_text("image_name,label\n" + "".join(f"{i:03d}.png,{i % 10}\n" for i in rows))
    write_pictures(folder / "faces", [f"{i}.png" for i in range(8)], 32)
    (folder / "noise").mkdir()
    for i in range(4):
        torch.save(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(i)), folder / "noise" / f"{i:02d}.pt")
    write_pictures(folder / "classes" / "val", [f"{c}_{i}.png" for c in range(4) for i in range(3)], 40)
    (folder / "classes" / "id2label.json").write_text(json.dumps({str(c): name for c, name in enumerate(("cat", "red apple", "bus", "tree"))}))
    write_pictures(folder / "many" / "val", [f"{c}_{i}.png" for c in range(12) for i in range(6)], 40)
    (folder / "many" / "id2label.json").write_text(json.dumps({str(c): f"thing {c}" for c in range(12)}))
    for number in "01":
        write_pictures(folder / "concepts" / number, ["0.png", "1.png", "2.png"], 70)
    content = {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1> on a hill"], "prompt_4_clip_eval": ["a dog on a hill"]},
               "1": {"src_image": "red car", "token_name": "<new2>", "prompt": ["a house in the style of <new2>"], "prompt_4_clip_eval": ["a house"]}}
    (folder / "concepts" / "input.json").write_text(json.dumps(content))
    for name in ("cat2", "watercolor"):
        write_pictures(folder / "challenge" / "concept_image" / name, ["0.png", "1.jpg"], 70)
    content = {"0": {"src_image": ["cat2", "watercolor"], "token_name": ["<cat2>", "<watercolor>"], "prompt": "A <cat2> on the left in a <watercolor> style.",
                     "prompt_4_clip_eval": "A cat on the left in a watercolor style."}}
    (folder / "challenge" / "prompts.json").write_text(json.dumps(content))

    styles = ("twemoji", "openmoji", "fluent-emoji-flat", "emojione", "noto-v1", "fluent-emoji-high-contrast", "noto")
    jobs = [(name, style) for name in ("red-apple", "dog-face", "bus", "tulip", "banana", "key", "star", "penguin", "panda", "unicorn") for style in styles]
    pixels = np.random.default_rng(0).integers(0, 256, (len(jobs), 64, 64, 4), np.uint8)
    np.savez(folder / "drawings.npz", pixels=pixels, names=np.array([name for name, _ in jobs]), styles=np.array([style for _, style in jobs]))
    for name in ("cat", "bus"):
        write_pictures(folder / "bench" / name, ["0.png", "1.png"], 70)
    listed = "prompt_list = [\n'a {0} {1} on a hill'.format(unique_token, class_token)\n]\n"
    (folder / "bench" / "prompts_and_classes.txt").write_text(f"cat,cat\nbus,toy\nObject Prompts\n{listed}Live Subject Prompts\n{listed}")

    torch.manual_seed(0)
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 64, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
              "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}}
    (folder / "clip").mkdir()
    save_file({name: tensor.contiguous() for name, tensor in open_clip.CLIP(**config).state_dict().items()}, folder / "clip" / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "clip" / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=32, attention_head_dim=2,
                                norm_num_groups=8, down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"],
                                up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])
    vae = AutoencoderKL(block_out_channels=(8, 8, 16, 16), layers_per_block=1, latent_channels=4, sample_size=64, norm_num_groups=8,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    encoder = CLIPTextModel(CLIPTextConfig(vocab_size=49408, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=encoder, tokenizer=make_clip_tokenizer(read_merges()), unet=unet, scheduler=scheduler, safety_checker=None,
                            feature_extractor=None, requires_safety_checker=False).save_pretrained(folder / "sd")


def make_narrow():
    """The miniature's own networks, which are trained here for a step, become a few channels wide."""
    from p3_clip_textual_inversion.miniature import models

    models.CLIP_CONFIG["text_cfg"] |= {"width": 32, "heads": 2, "layers": 1}
    models.VAE_CONFIG |= {"block_out_channels": (8, 8, 8), "norm_num_groups": 4}
    models.UNET_CONFIG |= {"block_out_channels": (16, 16, 16), "cross_attention_dim": 32, "norm_num_groups": 4}
    models.Unet.valid = 16


ONCE = {"P1 benchmark": "ampere", "P3 dreambench": "ampere", "P3 several": "ampere", "P3 miniature.words": "ampere",  # which are made of the others
        "P3 minimal learn": "turing", "P2 sweep": "turing", "P2 edit measure": "turing"}  # which compute in fp32 on every card
ELSEWHERE = {  # entry points that are not tried here, and why
    "p1_cfg_ddpm.make_mini": "uses no GPU", "p1_cfg_ddpm.quality": "uses no GPU",
    "p1_cfg_ddpm.pareto": "what P1's benchmark does, more often", "p1_cfg_ddpm.minimal": "knows one size of network, which is long",
    "p2_ddim.make_mini": "uses no GPU", "p2_ddim.minimal": "knows two sizes of network, which are long",
    "p3_clip_textual_inversion.benchmark": "networks of the real size",
    "p3_clip_textual_inversion.experiments.fullsize": "train and inference, of the real size",
    "p3_clip_textual_inversion.miniature.bench": "uses no GPU", "p3_clip_textual_inversion.miniature.challenge": "uses no GPU",
    "p3_clip_textual_inversion.miniature.drawings": "uses no GPU", "p3_clip_textual_inversion.miniature.together": "draws and judges, as several"}


REAL = torch.cuda.is_available()  # asked before any GPU is simulated


def left_out(name, card):
    return ONCE.get(name, card) != card


def commands(folder):
    """{name: (module, arguments)}; the first ones make what later ones read. A validation is always as long: large batches."""
    out, digits, concepts, sd, clip = (folder / name for name in ("out", "digits", "concepts/input.json", "sd", "clip"))
    challenge = folder / "challenge" / "prompts.json"
    p1, p2, p3 = "p1_cfg_ddpm", "p2_ddim", "p3_clip_textual_inversion"
    tiny = ["--size", "tiny", "--batch-size", 8, "--data", digits]
    faces = ["--image-size", 16, "--widths", 32, 32, "--attention", 1, "--batch-size", 8, "--data", folder / "faces"]
    words = [concepts, "--checkpoint", sd, "--batch-size", 64, "--crops", 1, "--vectors", 2]
    one_word = [*words, "--concepts", 0, "--sample-every", 0, "--validate-every", 100]
    drawings = ["--drawings", folder / "drawings.npz", "--batch-size", 4]
    draw = ["--num-images", 1, "--steps", 2, "--batch-size", 4]
    return {
        "P1 train": (f"{p1}.train", [*tiny, "--steps", 2, "--sample-every", 2, "--output", out / "p1"]),
        "P1 train, six": (f"{p1}.train", [*tiny, "--batch-size", 4, "--steps", 6, "--sample-every", 0, "--output", out / "p1six"]),
        "P1 train, two": (f"{p1}.train", [*tiny, "--batch-size", 4, "--steps", 2, "--sample-every", 0, "--output", out / "p1two"]),
        "P1 classifier": (f"{p1}.classifier", ["--domain", "mnistm", "--epochs", 1, "--batch-size", 10, "--data", digits, "--output",
                                               out / "judge.safetensors"]),
        "P1 inference": (f"{p1}.inference", [out / "digits", "--steps", 2, "--images-per-digit", 1, "--checkpoint", out / "p1/model.safetensors"]),
        "P1 evaluate": (f"{p1}.evaluate", [out / "digits"]),
        "P1 figures": (f"{p1}.figures", ["--steps", 2, "--tries", 2, "--checkpoint", out / "p1/model.safetensors", "--output", out / "figures"]),
        "P1 benchmark": (f"{p1}.benchmark", ["--images-per-digit", 2, "--seeds", 1, "--sweep-images-per-digit", 2, "--classic-images-per-digit", 0,
                                             "--checkpoint", out / "p1/model.safetensors", "--output", out / "p1.json"]),
        "P1 embedding": (f"{p1}.embedding", ["--epochs", 1, "--batch-size", 10, "--data", digits, "--output", out / "embedding.safetensors"]),
        "P1 distill": (f"{p1}.distill", [*tiny, "--teacher", out / "p1/model.safetensors", "--output", out / "student", "--paths", 8, "--teacher-steps", 3,
                                         "--steps", 2, "--tuning", 0.5, "--leaps", 2, "--validate-every", 2]),
        "P1 inference, student": (f"{p1}.inference", [out / "digits2", "--images-per-digit", 1, "--checkpoint", out / "student/model.safetensors"]),
        "P1 redraw": (f"{p1}.redraw", [out / "digits2/svhn/3_001.png", "--output", out / "redrawn.png"]),
        "P2 train": (f"{p2}.train", [*faces, "--batch-size", 16, "--steps", 2, "--sample-every", 2, "--dropout", 0.1, "--flip", "--output", out / "p2"]),
        "P2 train, six": (f"{p2}.train", [*faces, "--steps", 6, "--sample-every", 0, "--validate-every", 0, "--output", out / "p2six"]),
        "P2 train, two": (f"{p2}.train", [*faces, "--steps", 2, "--sample-every", 0, "--validate-every", 0, "--output", out / "p2two"]),
        "P2 inference": (f"{p2}.inference", [folder / "noise", out / "faces", out / "p2/UNet.pt", "--steps", 2]),
        "P2 inference, half": (f"{p2}.inference", [folder / "noise", out / "faces2", out / "p2/UNet.pt", "--steps", 2, "--dtype", "auto", "--eta", 1]),
        "P2 evaluate": (f"{p2}.evaluate", [out / "faces", out / "faces2"]),
        "P2 figures": (f"{p2}.figures", ["--noise", folder / "noise", "--checkpoint", out / "p2/UNet.pt", "--steps", 2, "--iterations", 1,
                                         "--round-trips", 2, "--pairs", 2, "--seeds", 2, "--output", out / "figures", "--results", out / "p2_figures.json"]),
        "P2 benchmark": (f"{p2}.benchmark", ["--way", "this project, bf16", "--side", 32, "--batch-size", 1, "--repeats", 1]),
        "P2 edit invert": (f"{p2}.edit", ["invert", folder / "faces", out / "inverted", out / "p2/UNet.pt", "--steps", 2]),
        "P2 edit morph": (f"{p2}.edit", ["morph", *(folder / "faces" / f"{i}.png" for i in range(3)), out / "morph", "--checkpoint", out / "p2/UNet.pt",
                                         "--steps", 2, "--frames", 2, "--dtype", "auto"]),
        "P2 edit measure": (f"{p2}.edit", ["measure", "--references", out / "faces", "--drawings", folder / "faces", "--checkpoint", out / "p2/UNet.pt",
                                           "--steps", 2, "--count", 2, "--output", out / "exact.json"]),
        "P2 inference, a pair": (f"{p2}.inference", [out / "inverted", out / "faces3", out / "p2/UNet.pt", "--sampler", "belm", "--steps", 2]),
        "P2 redraw": (f"{p2}.redraw", [out / "faces2/01.png", "--output", out / "redrawn2.png"]),
        "P2 sweep": (f"{p2}.sweep", ["--measure", "distance", "--checkpoint", out / "p2/UNet.pt", "--near", 1, "--truth", 2, "--evaluations", 2,
                                     "--side", 32, "--output", out / "sweep.json"]),
        "P2 quality": (f"{p2}.quality", [out / "p2/UNet.pt", "--faces", folder / "faces", "--count", 2, "--quality", "draft", "--side", 32, "--dtype", "auto",
                                         "--output", out / "quality.json"]),
        "P3 zero_shot": (f"{p3}.zero_shot", ["--data", folder / "classes", "--model", clip, "--dtype", "auto", "--output", out / "zero"]),
        "P3 train": (f"{p3}.train", [*words, "--steps", 2, "--sample-every", 2, "--output", out / "words"]),
        "P3 train, six": (f"{p3}.train", [*one_word, "--steps", 6, "--output", out / "wordsix"]),
        "P3 train, two": (f"{p3}.train", [*one_word, "--steps", 2, "--output", out / "wordtwo"]),
        "P3 train, projections": (f"{p3}.train", [*words, "--steps", 2, "--sample-every", 0, "--joint", "--custom-diffusion", "--prior", 2,
                                                  "--gradient-checkpointing", "--output", out / "custom"]),
        "P3 train, low rank": (f"{p3}.train", [*one_word, "--steps", 2, "--lora", 2, "--pivot", 0, "--hold", 0.5, "--prior", 0, "--output", out / "lora"]),
        "P3 inference": (f"{p3}.inference", [concepts, out / "pictures", sd, "--embeddings", out / "words", *draw]),
        "P3 inference, projections": (f"{p3}.inference", [concepts, out / "pictures2", sd, "--embeddings", out / "custom", *draw,
                                                          "--projections", out / "custom/0+1/projections.safetensors"]),
        "P3 inference, low rank": (f"{p3}.inference", [concepts, out / "pictures3", sd, "--embeddings", out / "lora", "--embeddings",
                                                       out / "words/new2.safetensors", "--lora", out / "lora/0/new1_lora_kohya.safetensors", *draw]),
        "P3 evaluate": (f"{p3}.evaluate", [out / "pictures", concepts, "--model", clip, "--num-images", 1, "--dtype", "auto"]),
        "P3 train, challenge": (f"{p3}.train", [challenge, *words[1:], "--steps", 1, "--sample-every", 0, "--output", out / "several"]),
        "P3 inference, challenge": (f"{p3}.inference", [challenge, out / "pictures4", sd, "--embeddings", out / "several", *draw]),
        "P3 evaluate, challenge": (f"{p3}.evaluate", [out / "pictures4", challenge, "--model", clip, "--dtype", "auto"]),
        "P3 both": (f"{p3}.experiments.both", ["--data", folder / "many", "--model", clip, "--pairs", 1, "--output", out / "both.json"]),
        "P3 figures": (f"{p3}.figures", ["--runs", out / "words", "--input", concepts, "--checkpoint", sd, "--output", out / "figures", "--steps", 2]),
        "P3 compare": (f"{p3}.experiments.compare", ["--learned", out / "words", "--input", concepts, "--checkpoint", sd, "--model", clip,
                                                     "--output", out / "report", *draw]),
        "P3 several": (f"{p3}.experiments.several", [concepts, "--checkpoint", sd, "--model", clip, "--ordinary-pictures", folder / "classes", "--runs", out,
                                                     "--report", out / "report", *draw]),
        "P3 inference, regions": (f"{p3}.inference", [concepts, out / "pictures5", sd, "--embeddings", out / "words", *draw, "--regions", "<new1>=0,0,0.5,1",
                                                      "--negative-prompt", "a cat", "--guidance-interval", 0.1, 0.9]),
        "P3 redraw": (f"{p3}.redraw", [out / "pictures5/0/0/source0_prompt0_0.png", "--output", out / "redrawn3.png"]),
        "P3 redraw, low rank": (f"{p3}.redraw", [out / "pictures3/0/0/source0_prompt0_0.png", "--output", out / "redrawn4.png"]),
        "P3 miniature.train autoencoder": (f"{p3}.miniature.train", ["autoencoder", *drawings, "--output", out / "vae", "--steps", 2]),
        "P3 miniature.train clip": (f"{p3}.miniature.train", ["clip", *drawings, "--output", out / "clip", "--steps", 1]),
        "P3 miniature.train judge": (f"{p3}.miniature.train", ["judge", *drawings, "--output", out / "second", "--steps", 1, "--seed", 1]),
        "P3 miniature.train unet": (f"{p3}.miniature.train", ["unet", *drawings, "--output", out / "unet", "--steps", 2, "--pool", 8,
                                                              "--clip", out / "clip", "--vae", out / "vae"]),
        "P3 miniature.scores": (f"{p3}.miniature.scores", [*drawings[:2], "--clip", clip, "--judge", clip, "--sd", sd, "--steps", 1, "--pictures", 3,
                                                           "--singles", 3, "--output", out / "scores"]),
        "P3 miniature.words": (f"{p3}.miniature.words", [*drawings[:2], "--clip", clip, "--sd", sd, "--count", 1, "--pictures", 1, "--output", out / "mini",
                                                         "--", "--steps", 1, "--batch-size", 16, "--crops", 1, "--vectors", 2, "--validate-every", 100]),
        "P3 minimal learn": (f"{p3}.minimal", ["learn", folder / "concepts/0", "--model", sd, "--steps", 2, "--output", out / "minimal3"]),
        "P3 minimal classify": (f"{p3}.minimal", ["classify", folder / "classes", "--clip", clip]),
        "P3 dreambench": (f"{p3}.experiments.dreambench", [folder / "bench", out / "bench", sd, "--model", clip, "--dino", "none", *draw, "--learn",
                                                           "--steps 1 --batch-size 64 --crops 1 --vectors 2 --validate-every 100"]),
    }


def call(module, arguments):
    """(exit code, what was said, seconds of the processor, {place: waits}) of a command in this process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    simulated_gpu.WAITS.clear()
    sys.argv, started, code, said = [module, *map(str, arguments)], time.process_time(), 0, io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), mock.patch("subprocess.run", run_here):
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) or stop.code is None else 1
            print(stop.code)
        except BaseException:
            code = 1
            traceback.print_exc()
    return {"code": code or 0, "said": re.sub(r"[^\n]*\r", "", said.getvalue())[-4000:], "seconds": round(time.process_time() - started, 1),
            "waits": dict(simulated_gpu.WAITS)}


def run_here(command, *args, plain=subprocess.run, **options):
    """subprocess.run, but that a process which would run a module of the project's is no process, whose GPU nobody would simulate."""
    if command[0] != sys.executable or (command[1] != "-m" and Path(command[1]).name != "guard.py"):
        return plain(command, *args, **options)
    argv, module = sys.argv, command[2]
    result = call(module, [*command[3:], *(["--prior", 2] if module == "p3_clip_textual_inversion.train" else [])])
    sys.argv = argv
    print(result["said"])
    return subprocess.CompletedProcess(command, result["code"], result["said"], result["said"])


def main():
    folder, card = Path(sys.argv[1]).resolve(), sys.argv[2]
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    folder.mkdir(parents=True, exist_ok=True)
    if not REAL:
        torch.inference_mode = torch.no_grad  # before anything is imported that asks for it
    make_inputs(folder)
    make_narrow()
    mode = contextlib.nullcontext()
    if not REAL:
        torch.set_num_threads(1)
        mode = simulated_gpu.install(card == "ampere")
    elif card == "turing":
        torch.cuda.get_device_capability = lambda *_: (7, 5)
        torch.cuda.is_bf16_supported = lambda including_emulation=True: including_emulation
    only = os.environ.get("GPU_COMMANDS", "")
    with mode:
        results = {}
        for name, (module, arguments) in commands(folder).items():
            if re.search(only, name) and not left_out(name, card):
                results[name] = call(module, arguments)
                print(f"{name}: {results[name]['code']} in {results[name]['seconds']} s", flush=True)
                (folder / "results.json").write_text(json.dumps({"real": REAL, "commands": results}))


if __name__ == "__main__":
    main()
