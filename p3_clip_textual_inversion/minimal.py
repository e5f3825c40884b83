r"""P3 on one page, which imports nothing of ours: a word is learned for what a few pictures show, and drawn with.

Textual inversion (Gal et al. 2023): in a Stable Diffusion, all of it frozen, x0 a latent of a picture, eps noise,

    (1)  x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) eps
    (2)  min E |eps(x_t, t, text("a photo of a <new1>")) - eps|^2               over the token rows of <new1> alone
    (3)  eps = (1 + w) eps(x_t, t, text(prompt)) - w eps(x_t, t, text(""))      guidance; diffusers' scale is 1 + w

And zero-shot classification by CLIP (Radford et al. 2021): the class is the caption whose feature is nearest.
Left out, and in the package: captions for each picture, min-SNR weights, half precision, resuming, single files, checks.

    python -m p3_clip_textual_inversion.minimal learn hw2_data/mini/textual_inversion/0 --initial "dog face" --vectors 4 --lr 5e-3 \
        --steps 300 --batch-size 16 --w 3 --caption "a drawing of a {}" --prompt "a drawing of a {} on a blue background"
    python -m p3_clip_textual_inversion.minimal classify hw2_data/mini/clip_zeroshot --clip hw2_data/mini/clip \
        --caption "a drawing of a {}"
"""

import argparse
import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageOps
from safetensors.torch import save_file
from torchvision.transforms.functional import pil_to_tensor
from torchvision.utils import save_image
from tqdm import tqdm, trange

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Words(torch.nn.Module):
    """The token table with new rows after its end. Only the rows are parameters to learn: the table cannot change."""

    def __init__(self, table, rows):
        super().__init__()
        self.table, self.rows = table.requires_grad_(False), torch.nn.Parameter(rows)

    def forward(self, ids):
        known = self.table.num_embeddings
        old, new = self.table(ids.clamp(max=known - 1)), self.rows[(ids - known).clamp(min=0)]
        return torch.where((ids >= known)[..., None], new, old)


def load(path):
    """Stable Diffusion's parts, frozen: tokenizer, text_encoder, unet, vae (the autoencoder), scheduler (with alpha_bar)."""
    parts = StableDiffusionPipeline.from_pretrained(path, safety_checker=None).to(DEVICE)
    for part in (parts.text_encoder, parts.unet, parts.vae):
        part.requires_grad_(False).eval()
    parts.scheduler = DDIMScheduler.from_config(parts.scheduler.config)
    return parts


def add_word(parts, word, initial, count):
    """Adds a word of `count` rows that begin as ordinary words'. Returns the `Words`, and how a prompt writes it out."""
    tokens = [word, *(f"{word}_{i}" for i in range(1, count))]
    table, ids = parts.text_encoder.get_input_embeddings(), parts.tokenizer(initial, add_special_tokens=False).input_ids
    parts.tokenizer.add_tokens(tokens)
    words = Words(table, table.weight[[ids[i % len(ids)] for i in range(count)]].clone())
    parts.text_encoder.set_input_embeddings(words)
    return words, " ".join(tokens)


def encode_text(parts, texts):
    """Hidden states [B, tokens, dim] of texts."""
    ids = parts.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    return parts.text_encoder(ids.to(DEVICE)).last_hidden_state


@torch.no_grad()
def encode_pictures(parts, folder):
    """The distribution of latents of a folder's pictures, cropped to squares, and of their mirror images."""
    side = parts.unet.config.sample_size * parts.vae_scale_factor
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))
    pictures = [ImageOps.exif_transpose(Image.open(path)).convert("RGB") for path in paths]  # as a camera says that they are up
    x = torch.stack([pil_to_tensor(ImageOps.fit(picture, (side, side))) for picture in pictures]).to(DEVICE) / 127.5 - 1
    return parts.vae.encode(torch.cat([x, x.flip(3)])).latent_dist


def loss(parts, x0, t, eps, captions):
    """(2). x0, eps: [B, 4, h, w]; t: [B]"""
    xt = parts.scheduler.add_noise(x0, eps, t)
    return F.mse_loss(parts.unet(xt, t, encode_text(parts, captions)).sample, eps)


def learn(parts, words, latents, caption, num_steps, batch_size, lr):
    """Learns the rows of `Words`, each of which keeps the length of the ordinary word's row that it began with."""
    length = words.rows.detach().norm(dim=1, keepdim=True)
    optimizer = torch.optim.AdamW([words.rows], lr, weight_decay=0)
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, num_steps)
    for _ in trange(num_steps, desc="learning"):
        x0 = latents.sample() * parts.vae.config.scaling_factor
        x0, t = x0[torch.randint(len(x0), (batch_size,))], torch.randint(1000, (batch_size,), device=DEVICE)
        loss(parts, x0, t, torch.randn_like(x0), [caption] * batch_size).backward()
        optimizer.step()
        optimizer.zero_grad()
        falling.step()
        words.rows.data *= length / words.rows.data.norm(dim=1, keepdim=True)


@torch.inference_mode()
def draw(parts, x, prompt, w=6.5, num_steps=50):
    """Pictures [B, 3, H, W] in [-1, 1] of a prompt, from noise x [B, 4, h, w], by (3) and DDIM."""
    hidden = encode_text(parts, [prompt] * len(x) + [""] * len(x))
    parts.scheduler.set_timesteps(num_steps, device=DEVICE)
    for t in tqdm(parts.scheduler.timesteps, desc="drawing"):
        cond, uncond = parts.unet(torch.cat([x, x]), t, hidden).sample.chunk(2)
        x = parts.scheduler.step((1 + w) * cond - w * uncond, t, x).prev_sample
    return parts.vae.decode(x / parts.vae.config.scaling_factor).sample.clamp(-1, 1)


@torch.inference_mode()
def classify(folder, clip, caption):
    """The share of folder/val/{class}_{number}.png that CLIP takes for what they are. clip: a folder, or OpenAI's by name."""
    source = (f"local-dir:{clip}", None) if Path(clip).is_dir() else (clip, "openai")
    model, _, transform = open_clip.create_model_and_transforms(*source, device=DEVICE)
    merges = Path(clip, "bpe.txt.gz")  # the miniature has a vocabulary of its own
    tokenizer = open_clip.SimpleTokenizer(str(merges)) if merges.is_file() else open_clip.get_tokenizer(source[0])
    labels = json.loads(Path(folder, "id2label.json").read_text())
    ids = tokenizer([caption.format(label) for label in labels.values()], context_length=model.context_length)
    texts = model.encode_text(ids.to(DEVICE), normalize=True)
    right, paths = 0, sorted(Path(folder, "val").glob("*.png"))
    for path in tqdm(paths, desc="classifying"):
        feature = model.encode_image(transform(Image.open(path).convert("RGB"))[None].to(DEVICE), normalize=True)
        right += list(labels)[(texts @ feature[0]).argmax()] == path.stem.split("_")[0]
    return right / len(paths)


FLAGS = {  # the published settings of Stable Diffusion v1; the miniature's are in the example above
    "--model": ("hw2_data/mini/stable_diffusion", "folder, or a name on the hub"), "--word": ("<new1>", "to learn"),
    "--initial": ("dog", "words to begin with"), "--vectors": (1, "rows of the word"), "--steps": (3000, "of learning"),
    "--batch-size": (4, "pictures a step; 11 GB hold 2"), "--lr": (2e-3, "learning rate"), "--caption": ("a photo of a {}", "of each picture"),
    "--prompt": ("a photo of a {}", "to draw"), "--w": (6.5, "guidance weight"), "--clip": ("ViT-B-32-quickgelu", "of open_clip, or a folder"),
    "--output": ("p3_minimal", "OUTPUT.safetensors will be the word, OUTPUT.png four pictures")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("learn", "classify"), help="a word of pictures; or pictures into classes")
    parser.add_argument("folder", help="of pictures to learn from, or of val/ and id2label.json to classify")
    for flag, (default, told) in FLAGS.items():
        parser.add_argument(flag, type=type(default), default=default, help=f"{told} (default: {default})")
    args = parser.parse_args()
    if args.command == "classify":
        print(f"{classify(args.folder, args.clip, args.caption):.1%} are right")
        return
    parts = load(args.model)
    words, written = add_word(parts, args.word, args.initial, args.vectors)
    learn(parts, words, encode_pictures(parts, args.folder), args.caption.format(written), args.steps, args.batch_size, args.lr)
    save_file({args.word: words.rows.data.cpu()}, f"{args.output}.safetensors")  # as web UIs and diffusers read it
    noise = torch.randn(4, 4, *[parts.unet.config.sample_size] * 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pictures = draw(parts, noise, args.prompt.format(written), args.w)
    save_image(pictures, f"{args.output}.png", normalize=True, value_range=(-1, 1))


if __name__ == "__main__":
    main()
