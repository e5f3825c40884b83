"""How close a network's faces are to drawn ones: Fréchet distance in the features of a frozen network, high-frequency energy, grain.

    python -m p2_ddim.make_mini faces runs/held_out --count 3000 --seed 1
    python -m p2_ddim.quality UNet.pt                                          # writes report/results/p2_quality.json

All but the last 500 of those faces are the reference; what as many generated ones score is set beside what these 500 drawn ones score, as a ratio. The
features are those of the bundled miniature of CLIP (hw2_data/mini/clip), which was trained on emoji and never saw these faces.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from .data import MINI_DATA, read_faces
from .device import DTYPES, describe, name_of, pick_device, pick_dtype
from .files import ROOT, UserError, check_flags, fingerprint, run, writable_file, write_json
from .inference import QUALITIES, check_size, generate, to_pictures
from .model import load_unet
from .provenance import REPORTED, HelpFormatter, command_line, report_file
from .samplers import ImageNoise

HELD_OUT = Path("runs/held_out")  # which make_mini faces draws, as above
CLIP = ROOT / "hw2_data" / "mini" / "clip"


@torch.inference_mode()
def features(pictures, folder=CLIP):
    """uint8 [N, H, W, 3] -> float64 [N, F]: a CLIP's image embeddings, not normalised. folder: a model in open_clip's format."""
    import open_clip
    from PIL import Image

    try:
        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{Path(folder).resolve()}")
    except Exception as error:  # its loaders raise many kinds
        raise UserError(f"cannot load the CLIP in {folder}: {str(error).splitlines()[0]}") from None
    batches = [torch.stack([transform(Image.fromarray(picture)) for picture in pictures[i:i + 100]]) for i in range(0, len(pictures), 100)]
    return torch.cat([model.eval().encode_image(batch) for batch in batches]).double()


def frechet_distance(a, b):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of features [N, F] each (Heusel et al. 2017).

    The trace of the root of C1 C2 is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric."""
    first, second = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(first)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(dim=0) - b.mean(dim=0)).square().sum() + first.trace() + second.trace() - 2 * cross)


def high_frequency(pictures):
    """Mean energy, in squared grey levels, that uint8 [N, H, W, 3] have above half the highest frequency (0.25 cycles a pixel, in either direction)."""
    spectrum = np.abs(np.fft.fft2(pictures.astype(float), axes=(1, 2), norm="forward")) ** 2
    y, x = (np.abs(np.fft.fftfreq(n)) for n in pictures.shape[1:3])
    high = np.maximum(y[:, None], x[None]) > 0.25
    return float(spectrum[:, high].sum(axis=1).mean())


def grain(pictures):
    """Noise in flat places, in grey levels: from the median absolute diagonal difference of 2x2 pixels, as if it was Gaussian."""
    x = pictures.astype(float)
    return float(np.median(np.abs(x[:, ::2, ::2] - x[:, 1::2, ::2] - x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 2) / 0.6745)


def measure(pictures, truth):
    """Of uint8 pictures [N, H, W, 3]: Fréchet distance to features `truth` [M, F], high-frequency energy, grain."""
    return {"frechet": frechet_distance(features(pictures), truth), "high_frequency": high_frequency(pictures), "grain": grain(pictures)}


def compare(generated, drawn):
    """What `measure` says of both, side by side, with their ratio where it tells something: drawn faces have no grain."""
    rows = {name: {"generated": generated[name], "drawn": drawn[name]} for name in drawn}
    for name in ("frechet", "high_frequency"):
        rows[name]["ratio"] = generated[name] / drawn[name]
    return rows


def check_faces(folder):
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of drawn faces; python -m p2_ddim.make_mini faces {folder} --count 3000 --seed 1 draws some")


def side_of(args):
    """--side or, without it, the bundled network's; a `UserError` for others: a network draws any side, and well only the one that it was trained on."""
    if args.side is None and fingerprint(args.checkpoint) != fingerprint(MINI_DATA / "UNet.pt"):
        raise UserError(f"--side is missing: {args.checkpoint} does not tell of what side its pictures are (the course's: 256)")
    return 64 if args.side is None else args.side


def main():
    parser = argparse.ArgumentParser(description="Measures a face network against drawn faces.", formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", nargs="?", default=MINI_DATA / "UNet.pt", help="the network's state dict")
    parser.add_argument("--faces", type=Path, default=HELD_OUT, help="folder of drawn faces that the network was not trained on")
    parser.add_argument("--count", type=int, default=500, help="generated faces, and drawn ones beside them")
    parser.add_argument("--quality", choices=list(QUALITIES), nargs="+", default=list(QUALITIES), help="which of p2_infer's ways of drawing")
    parser.add_argument("--side", type=int, default=None, help="of the pictures (default: 64 for the bundled network; others do not tell theirs)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noises")
    parser.add_argument("--batch-size", type=int, default=50, help="faces at a time")
    parser.add_argument("--dtype", choices=["auto", *DTYPES], default="fp32", help="number format of the network")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--output", type=Path, default=None, help=f"the JSON file to write {REPORTED}")
    args = parser.parse_args()
    args.side = side_of(args)
    check_flags(args, ("count", "side", "batch_size"), lambda value: value >= 2, "at least 2")
    check_faces(args.faces)
    args.output = writable_file(report_file(args.output, "p2_quality.json", args.checkpoint, MINI_DATA / "UNet.pt"))
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device)
    print(f"measuring {args.checkpoint} on {describe(device, dtype)}", flush=True)
    model = load_unet(args.checkpoint, device)
    check_size(model.config, (3, args.side, args.side))
    faces = read_faces(args.faces, args.side)
    if len(faces) < 2 * args.count:
        raise UserError(f"{args.faces} has {len(faces)} pictures; --count {args.count} needs twice as many at least")
    names = [f"quality/{i}" for i in range(args.count)]
    noises = dict(zip(names, ImageNoise(args.seed, names, (3, args.side, args.side))()))
    stretched = to_pictures(torch.from_numpy(faces).permute(0, 3, 1, 2))  # as the generated ones are
    truth, rows = features(stretched[:-args.count]), {}
    drawn = measure(stretched[-args.count:], truth)
    for quality in args.quality:
        drawing = generate(model, noises, QUALITIES[quality], args.batch_size, f"{args.seed}, fresh", dtype)
        generated = np.concatenate([to_pictures(x[None]) for _, x in drawing])
        rows[quality] = compare(measure(generated, truth), drawn)
        print("\n".join(f"{quality:6} {name:15} " + "  ".join(f"{key} {value:.4f}" for key, value in row.items()) for name, row in rows[quality].items()))
    command = command_line("python -m p2_ddim.quality", parser, args, leave_out=("device", "output"))
    write_json(args.output, {"command": command, "checkpoint": args.checkpoint.name, "model": fingerprint(args.checkpoint), "count": args.count,
                             "dtype": name_of(dtype), **rows})
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
