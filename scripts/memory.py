"""The most memory that each command needs on a GPU at its real size, counted without one: report/results/memory.json, and two pages' tables.

torch runs the project's own code with tensors that have a shape, a type and the device "cuda", but no numbers (FakeTensorMode); `Counter` adds up their
storages while they live: weights, gradients, the optimiser's state, averages, what autograd keeps, and what comes and goes between. Not in it: CUDA's own
context (about 0.5 GB), workspaces of cuDNN and cuBLAS, and what the allocator cannot use for want of one piece. "checks" in the JSON has how far that is off
from peaks that torch's allocator has measured on a GPU.

Attention is taken to be torch's memory-efficient kernel, which every card from sm_50 has and which keeps no matrix of positions by positions.
"""

import argparse
import json
from functools import partial
from pathlib import Path
from unittest import mock

import torch

from common import ROOT, read_json, run, write_whole
from counting import counted
from p1_cfg_ddpm import device as devices

RESULTS = ROOT / "report" / "results" / "memory.json"
GPU = torch.device("cuda")
CARD = 11.5e9  # bytes that a card of "11 GB" (11,264 MiB) has for a process, beside a screen
ROOM = 0.87  # of them for what is counted: the rest is CUDA's context and the error of the method
CARDS = {"RTX 2080 Ti": (7, 5), "GTX 1080 Ti": (6, 1)}  # neither computes bf16: fp16 on the first, fp32 on the second (device.pick_dtype)
DIGITS, FACES = 150_000, 1_000  # pictures that a training holds on the GPU: as many as MNIST-M and SVHN have; for P2 some


def dtype_on(card, name="auto", among=("bf16", "fp16")):
    """The number format that a command chooses on a card."""
    with mock.patch("torch.cuda.get_device_capability", lambda *_: CARDS[card]), mock.patch("torch.cuda.get_device_name", lambda *_: card):
        return devices.pick_dtype(name, GPU, among)


# --- the commands, by the project's own functions ---

def step(optimizer, dtype, loss, *args):
    """A training step as accelerate makes it, of loss(*args): the network under autocast, gradients clipped."""
    with devices.autocast(GPU, dtype):
        value = loss(*args).mean()
    value.float().backward()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    for group in [*optimizer.param_groups, *getattr(optimizer, "adamw", optimizer).param_groups]:
        group["foreach"] = True  # torch's choice on a GPU
    muon = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32  # what `orthogonalised` computes in, on a card whose fast format is `dtype`
    with mock.patch("p1_cfg_ddpm.training.pick_dtype", lambda *_, **__: muon), mock.patch("p2_ddim.training.pick_dtype", lambda *_, **__: muon):
        optimizer.step()
    optimizer.zero_grad()


def p1_train(size, batch, dtype, lengths=(0.1,), steps=2, digits=DIGITS):
    from p1_cfg_ddpm import model as models
    from p1_cfg_ddpm.diffusion import Diffusion
    from p1_cfg_ddpm.train import PowerEMA, to_model
    from p1_cfg_ddpm.training import make_optimizer

    data = torch.empty(digits, 28, 28, 3, dtype=torch.uint8, device=GPU)
    with GPU:
        net = models.UNet(models.SIZES[size]).to(memory_format=torch.channels_last)
    ema, diffusion, optimizer = PowerEMA(net, lengths), Diffusion(), make_optimizer(net, 2e-3, 0.01, (0.9, 0.99), edges=("stem", "head"))
    averaged = ema.network()  # a validation's: counted beside the steps, though a step no longer holds it
    ints = torch.zeros(batch, dtype=torch.long, device=GPU)
    for number in range(1, steps + 1):
        eps = torch.randn(batch, 3, 28, 28, device=GPU)
        step(optimizer, dtype, diffusion.loss, net, to_model(data[ints]), ints, ints, ints, eps, ints > 0)
        ema.update(net, number)
    del averaged


def p1_infer(size, batch, dtype):
    from p1_cfg_ddpm import inference
    from p1_cfg_ddpm import model as models
    from p1_cfg_ddpm.diffusion import Diffusion

    with GPU:
        net = models.UNet(models.SIZES[size]).to(dtype=dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
    list(inference.generate(net, Diffusion(), inference.all_jobs(batch // 20), inference.DrawConfig(num_steps=3), batch, shown=False))


def p2_net(widths=(128, 128, 256, 256, 512, 512), attention=(4,), blocks=2):
    from p2_ddim.model import UNet, UNetConfig

    with GPU:
        return UNet(UNetConfig(widths, attention, blocks)).to(memory_format=torch.channels_last)


def p2_infer(batch, dtype):
    from p2_ddim.inference import DrawConfig, generate

    noises = {str(i): torch.zeros(3, 256, 256) for i in range(batch)}
    list(generate(p2_net().eval().requires_grad_(False), noises, DrawConfig(num_steps=2), batch, dtype=dtype, shown=False))


def p2_train(side, batch, dtype, faces=FACES, **config):
    from p2_ddim import diffusion
    from p2_ddim.pictures import to_model
    from p2_ddim.training import averaged_copy, ema_update, make_optimizer

    data = torch.empty(faces, side, side, 3, dtype=torch.uint8, device=GPU)
    net = p2_net(**config)
    ema, alpha_bar = averaged_copy(net), diffusion.make_alpha_bar().float().to(GPU)
    optimizer = make_optimizer(net, 2e-3, 0.01, (0.9, 0.99), edges=("down1.", "out."))
    ints = torch.zeros(batch, dtype=torch.long, device=GPU)
    for number in range(2):
        x0, eps = to_model(data[ints]), torch.randn(batch, 3, side, side, device=GPU)
        x0 = torch.where((ints > 0)[:, None, None, None], x0.flip(3), x0)
        step(optimizer, dtype, diffusion.loss, net, alpha_bar, x0.contiguous(memory_format=torch.channels_last), ints, eps, 20.0)
        ema_update(ema, net, number, 0.999)


def stable_diffusion(dtype, vae_dtype=torch.float32):
    """Stable Diffusion v1 from its configurations in p3_clip_textual_inversion/sd_v1, as `load_stable_diffusion` puts it on a GPU."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from p3_clip_textual_inversion.clip import make_clip_tokenizer, read_merges
    from p3_clip_textual_inversion.diffusion import make_alpha_bar
    from p3_clip_textual_inversion.model import CONFIGS, StableDiffusion

    with GPU:
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet")).to(dtype)
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae")).to(vae_dtype)
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"))
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    return StableDiffusion(make_clip_tokenizer(read_merges()), text, vae, unet, make_alpha_bar())


def p3_infer(batch, dtype):
    from p3_clip_textual_inversion.inference import DrawConfig, generate

    parts = stable_diffusion(dtype, torch.float32 if dtype == torch.float32 else torch.float16)
    list(generate(parts, ["a photo of a dog on a hill"] * batch, [str(i) for i in range(batch)], DrawConfig(num_steps=2, batch_size=batch, dtype=dtype)))


def p3_train(batch, dtype, checkpointing=False, projections=False, lora=0, only=("pictures", "step", "samples")):
    """Textual inversion, with projections Custom Diffusion, with a rank LoRA: pictures encoded, a step, samples drawn, in this order as `learn` has it."""
    from p3_clip_textual_inversion.custom_diffusion import projections as projections_of
    from p3_clip_textual_inversion.defaults import SD_V1
    from p3_clip_textual_inversion.embedding import add_words
    from p3_clip_textual_inversion.inference import DrawConfig, generate
    from p3_clip_textual_inversion.lora import add_lora
    from p3_clip_textual_inversion.objective import Loss
    from p3_clip_textual_inversion.sources import encode

    parts = stable_diffusion(dtype)
    learned = add_words(parts, {"<new1>": torch.zeros(max(SD_V1.learning.vectors, 1), 768)})
    if "pictures" in only:
        encode(parts, torch.zeros(4, 3, 512, 512), [""])
    if checkpointing:
        parts.unet.enable_gradient_checkpointing()
        parts.unet.train()
    trained = [learned.rows]
    if projections:
        trained += [linear.float().weight.requires_grad_(True) for linear in projections_of(parts.unet).values()]
    if lora:
        trained += add_lora(parts.unet, lora, seed=0).values()
    if "step" in only:
        loss, optimizer = Loss(parts, SD_V1.learning.min_snr_gamma), torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
        ids = loss.ids(["a photo of a <new1>"] * batch)
        for _ in range(2):
            x0, eps = (torch.randn(batch, 4, 64, 64, device=GPU) for _ in range(2))
            step(optimizer, dtype, loss, x0, torch.zeros(batch, dtype=torch.long, device=GPU), eps, *ids)
    if "samples" in only:
        list(generate(parts, ["a <new1>"] * 4, list("abcd"), DrawConfig(num_steps=2, batch_size=4, dtype=dtype)))


def p3_several(batch, dtype):
    """The drawings of p3_several.sh, with CLIP beside them; its trainings are those of p3_train, in processes of their own."""
    from p3_clip_textual_inversion.inference import DrawConfig, generate
    from p3_clip_textual_inversion.regions import plans_of

    judge = clip("ViT-B-32")
    parts = stable_diffusion(torch.float32)
    config, prompt = DrawConfig(num_steps=2, batch_size=batch, dtype=dtype, regions="auto"), "a dog next to a cat"
    list(generate(parts, [prompt] * batch, [str(i) for i in range(batch)], config, plans_of([prompt], config, {})))
    del judge


def clip(name):
    import open_clip

    with GPU:
        return open_clip.create_model(name, device="cuda").eval().requires_grad_(False)


def p3_clip(name, batch, dtype):
    """80 classes of 80 captions at most, in batches of 256; then pictures."""
    from p3_clip_textual_inversion.clip import compute_in, image_features

    net = clip(name)
    compute_in(net, dtype)
    with torch.inference_mode():
        net.encode_text(torch.zeros(256, 77, dtype=torch.long, device=GPU))
    image_features(net, [torch.zeros(batch, 3, 224, 224)], GPU, dtype)


# --- the table ---

def rows():
    """[(what is run, its settings, work(dtype, and keywords), its defaults, formats that "auto" chooses among or a name, [(flags, keywords)])]:
    the last are what a card takes that does not hold the defaults, in the order in which they are tried."""
    from p3_clip_textual_inversion.defaults import SD_V1

    batch, learning = SD_V1.drawing.batch_size, SD_V1.learning.batch_size
    smaller = [(f"--batch-size {n}", {"batch": n}) for n in (128, 64, 32, 16, 8, 4, 2, 1)]
    checkpointing = ("--gradient-checkpointing", {"checkpointing": True})
    auto, digits = ("bf16", "fp16"), f"{DIGITS:,} digits on the GPU"
    return [
        ("p1_train.sh --size base --batch-size 128", f"28.6 M parameters, {digits}", partial(p1_train, size="base"), {"batch": 128}, auto, smaller[1:]),
        ("p1_train.sh --size base --batch-size 256", "the same", partial(p1_train, size="base"), {"batch": 256}, auto, smaller),
        ("p1_train.sh --size medium --batch-size 512", "7.5 M, the same", partial(p1_train, size="medium"), {"batch": 512}, auto, smaller),
        ("p1_infer.sh OUT", "a base model, batches of 1,000", partial(p1_infer, size="base"), {"batch": 1000}, auto, []),
        ("p2_infer.sh NOISE_DIR OUT UNet.pt", "the course's 113.67 M, 256x256, batches of 10, fp32", p2_infer, {"batch": 10}, "fp32", []),
        ("p2_train.sh", f"the defaults, batches of 32, {FACES:,} pictures of 64x64 on the GPU",
         partial(p2_train, side=64, widths=(32, 32, 64, 96, 128), attention=(4,), blocks=1), {"batch": 32}, auto, smaller[3:]),
        ("p2_train.sh --image-size 256 --widths 128 128 256 256 512 512 --blocks 2",
         f"the course's 113.67 M, batches of 32, {FACES:,} pictures on the GPU", partial(p2_train, side=256), {"batch": 32}, auto, smaller[3:]),
        ("p3_infer.sh INPUT_JSON OUT CKPT", f"Stable Diffusion v1, 512x512, batches of {batch}", p3_infer, {"batch": batch}, auto, smaller[-2:]),
        ("p3_train.sh", f"textual inversion, likewise, batches of {learning}", p3_train, {"batch": learning}, auto, [checkpointing]),
        ("p3_train.sh --gradient-checkpointing", "the same", partial(p3_train, checkpointing=True), {"batch": learning}, auto, smaller[-2:]),
        ("p3_train.sh --custom-diffusion", "the same", partial(p3_train, projections=True), {"batch": learning}, auto, [checkpointing]),
        ("p3_train.sh --lora", "the same, of the default rank", partial(p3_train, lora=SD_V1.low_rank.lora), {"batch": learning}, auto, [checkpointing]),
        ("p3_several.sh", f"batches of {batch}, regions for two things, CLIP ViT-B/32 beside them", p3_several, {"batch": batch}, auto, smaller[-2:]),
        ("p3_clip.sh --model ViT-B-32.pt", "batches of 64; p3_grade.sh alike", partial(p3_clip, name="ViT-B-32"), {"batch": 64}, ("bf16",), smaller[2:]),
        ("p3_clip.sh --model ViT-L-14.pt", "batches of 64", partial(p3_clip, name="ViT-L-14"), {"batch": 64}, ("bf16",), smaller[2:]),
    ]


def checks():
    """[(what, bytes that torch's allocator had at most, on what, work)]"""
    bf16, h200 = torch.bfloat16, "NVIDIA H200"
    return [
        ("P2 train, 3.68 M parameters, 64x64, batches of 256, bf16", 8.31e9, h200,
         partial(p2_train, side=64, batch=256, dtype=bf16, faces=16_000, widths=(32, 64, 96, 128), attention=(3,), blocks=1)),
        ("P1 train, medium, batches of 512, bf16, with --compile, which is not counted", 2.32e9, h200,
         partial(p1_train, size="medium", batch=512, dtype=bf16, lengths=(0.1, 0.05, 0.2), digits=40_000)),
    ]


def peak(work):
    """The most bytes of the GPU that work() holds."""
    with counted() as counter:
        work()
    return counter.peak


def peak_on_cpu(work):
    """The same as torch's profiler sees it allocated on the CPU, in a real run."""
    with mock.patch(f"{__name__}.GPU", torch.device("cpu")), torch.profiler.profile(profile_memory=True) as profile:
        work()
    events = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    now = most = 0
    for _, size in events:
        now += size
        most = max(most, now)
    return most


def on_card(card, work, defaults, formats, others):
    """What the JSON says of a command on a card."""
    dtype = dtype_on(card, formats) if isinstance(formats, str) else dtype_on(card, among=formats)
    result = {"dtype": devices.name_of(dtype), "gb": round(peak(partial(work, dtype=dtype, **defaults)) / 1e9, 2)}
    result["fits"] = result["gb"] * 1e9 <= ROOM * CARD
    for flags, settings in others if not result["fits"] else ():
        gb = round(peak(partial(work, dtype=dtype, **{**defaults, **settings})) / 1e9, 2)
        if gb * 1e9 <= ROOM * CARD:
            return result | {"with": flags, "gb_with": gb}
    return result


def table(results, short=False):
    """The table of scripts/README.md, of the JSON. short: README's, of what takes 5 GB or more, in lines of at most 120 characters."""
    def cell(row):
        text = f"{row['gb']:.1f}{'' if short else ' (' + row['dtype'] + ')'}"
        if row["fits"]:
            return text
        return f"**{text}**; `{row['with']}`: {row['gb_with']:.1f}" if "with" in row and not short else f"**{text}**"

    def flags(row):
        return "; ".join(sorted({f"`{row[card]['with']}`" for card in CARDS if "with" in row[card]}))

    head = [f"GB of tensors at most{', fp16 or fp32' if short else ' | settings'}", *CARDS, *["what fits"] * short]
    lines = ["| " + " | ".join(head) + " |", "| --- " * (len(CARDS) + 2) + "|"]
    for row in results["commands"]:
        if short and max(row[card]["gb"] for card in CARDS) < 5:
            continue
        cells = [f"`{row['command']}`", *([] if short else [row["settings"]]), *(cell(row[card]) for card in CARDS), *([flags(row)] if short else [])]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def show(results):
    """Prints the tables of the two pages."""
    for page, short in (("scripts/README.md", False), ("README.md", True)):
        print(f"\n{page}:\n\n{table(results, short)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=RESULTS, help="the JSON (default: report/results/memory.json)")
    parser.add_argument("--render", action="store_true", help="count nothing, only print the table of the JSON")
    args = parser.parse_args()
    if args.render:
        show(read_json(args.output))
        return
    results = {"attention": "memory-efficient: no matrix of positions by positions", "torch": torch.__version__.split("+")[0],
               "card_gb": CARD / 1e9, "fits_gb": round(ROOM * CARD / 1e9, 2), "checks": [], "commands": []}
    for what, measured, where, work in checks():
        own = peak(work)
        results["checks"].append({"what": what, "where": where, "measured_gb": round(measured / 1e9, 2), "counted_gb": round(own / 1e9, 2),
                                  "difference": round(own / measured - 1, 3)})
        print(f"{what}: {measured / 1e9:.2f} GB on {where}, counted {own / 1e9:.2f}", flush=True)
    small = partial(p1_train, size="small", batch=16, dtype=torch.float32, digits=1000)
    measured, own = peak_on_cpu(small), peak(small)
    results["checks"].append({"what": "P1 train, small, batches of 16, fp32", "where": "a CPU, by torch's profiler", "measured_gb": round(measured / 1e9, 3),
                              "counted_gb": round(own / 1e9, 3), "difference": round(own / measured - 1, 3)})
    print(results["checks"][-1], flush=True)
    for command, settings, work, defaults, formats, others in rows():
        row = {"command": command, "settings": settings} | {card: on_card(card, work, defaults, formats, others) for card in CARDS}
        results["commands"].append(row)
        print(f"{command}: {row}", flush=True)
    write_whole(args.output, json.dumps(results, indent=1) + "\n")
    show(results)
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
