"""Downloads the published weights that the course's grading uses into hw2_data/weights/, where the other scripts find them. Needs the internet.

Run again after an interruption, it goes on where it stopped. Each file is checked against its published SHA-256 before it gets its name. Nothing in the
files is run: the project reads tensors only.
"""

import argparse
import fcntl
import hashlib
import http.client
import os
import shutil
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from common import ROOT, fail, run

WEIGHTS = ROOT / "hw2_data" / "weights"
CHUNK, TRIES = 2**20, 5


@dataclass(frozen=True)
class Weights:
    """A published file. size: in bytes, where it is known to the byte; about: otherwise."""
    name: str
    what: str
    url: str | None
    size: int | None
    sha256: str | None
    licence: str
    about: str = ""

    @property
    def told_size(self):
        return f"{self.size / 1e9:.2f} GB" if self.size else self.about


HUB, OPENAI = "https://huggingface.co", "https://openaipublic.azureedge.net/clip/models"
VIT_B, VIT_L = "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836"
FILES = (
    Weights("sd-v1-4.ckpt", "Stable Diffusion v1.4, drawn and learned with in problem 3",
            f"{HUB}/CompVis/stable-diffusion-v-1-4-original/resolve/main/sd-v1-4.ckpt", 4_265_380_512,
            "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556", "CreativeML OpenRAIL-M"),
    Weights("ViT-B-32.pt", "CLIP ViT-B/32 by OpenAI, which grades problem 3", f"{OPENAI}/{VIT_B}/ViT-B-32.pt", 353_976_522, VIT_B, "MIT"),
    Weights("ViT-L-14.pt", "CLIP ViT-L/14 by OpenAI, for the zero-shot classification", f"{OPENAI}/{VIT_L}/ViT-L-14.pt", 932_768_134, VIT_L, "MIT"),
    Weights("resnet34_svhn.bin", "the course's grader of SVHN digits", f"{HUB}/edadaltocg/resnet34_svhn/resolve/main/pytorch_model.bin", None,
            "edf4cc739949c952d18c2ac551be526a5c3cdef91a15f2ac77dbf38f85568509", "MIT", about="85.3 MB"),
    Weights("Classifier.pth", "the course's grader of MNIST-M digits; comes with the assignment, has no public address: put it there", None, None, None,
            "the course's", about="small"),
)


class Wrong(Exception):
    """What a server answered is not the file, or none of it."""


class NotHad(Exception):
    """A server has one file not, or not for us: others may come all the same."""


def sha256_of(path):
    """Of a file, with a progress bar where it is large."""
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"checking {path.name}", leave=False, disable=size < 10**8) as bar:
        while block := file.read(CHUNK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def fetch(url, part, size):
    """Appends to the file `part` what is still to come of url; size: of the whole, if known. An exception of urllib, or `Wrong`, where that fails."""
    there = part.stat().st_size if part.exists() else 0
    if size and there == size:
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={there}-"} if there else {})
    if (token := os.environ.get("HF_TOKEN")) and url.startswith(f"{HUB}/"):
        request.add_unredirected_header("Authorization", f"Bearer {token}")  # for the hub alone, not for where it sends to
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if error.code == 416 and there:  # nothing to come
            return
        raise
    with answer:
        whole = answer.status != 206  # a server that knows no ranges sends everything again
        length = answer.headers.get("Content-Length")
        total = int(length) + (0 if whole else there) if length else size
        if size and total and total != size:
            raise Wrong(f"it has {total:,} bytes, expected {size:,}")
        if (kind := answer.headers.get("Content-Type", "")).startswith("text/html"):
            raise Wrong(f"the server sent a page ({kind}) in place of the file")
        free = shutil.disk_usage(part.parent).free + (there if whole else 0)
        left = total and total - (0 if whole else there)
        if left and left > free:
            raise Wrong(f"{left / 1e9:.1f} GB are still to come, but only {free / 1e9:.1f} GB are free on the disk of {part.parent}")
        with open(part, "ab") as file, tqdm(total=total, initial=0 if whole else there, unit="B", unit_scale=True, desc=part.stem) as bar:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise Wrong("another download of it is running") from None
            if whole:
                file.truncate(0)
            while block := answer.read(CHUNK):
                file.write(block)
                bar.update(len(block))
    if total and part.stat().st_size < total:
        raise http.client.IncompleteRead(b"", total - part.stat().st_size)


def download(weights, folder):
    """Puts a file into the folder; whether it had to. Ends the program, in one line, where it cannot; `NotHad` where that is of this file alone."""
    path, part = folder / weights.name, folder / f"{weights.name}.part"
    elsewhere = f"Without internet, get it elsewhere, put it at {path} and run this again, to check it"
    if path.exists():
        if weights.sha256 and sha256_of(path) != weights.sha256:
            fail(f"{path} is there, but is not the published file (SHA-256 {weights.sha256}); move it away and run this again")
        return False
    for attempt in range(TRIES):
        try:
            fetch(weights.url, part, weights.size)
            break
        except Wrong as error:
            fail(f"{weights.name} could not be downloaded: {error}. {elsewhere}")
        except urllib.error.HTTPError as error:
            gated = "; its page on the hub may ask to accept the licence first; then set HF_TOKEN to a token of yours" if error.code in (401, 403) else ""
            raise NotHad(f"{weights.name} could not be downloaded: the server answers {error.code} {error.reason}{gated} ({weights.url}). "
                         f"{elsewhere}") from None
        except (OSError, http.client.HTTPException) as error:  # a connection that breaks is taken up again
            if attempt + 1 == TRIES or (isinstance(error, OSError) and error.filename is not None):  # a name means: our file, not the network
                kept = f"; {part.stat().st_size / 1e6:.0f} MB are kept, run this again to go on" if part.exists() and part.stat().st_size else ""
                fail(f"{weights.name} could not be downloaded ({getattr(error, 'reason', None) or error}){kept}. {elsewhere}")
            time.sleep(attempt)
    if weights.sha256 and sha256_of(part) != weights.sha256:
        part.unlink()
        fail(f"what came from {weights.url} is not the published file (SHA-256 {weights.sha256}); run this again")
    part.replace(path)
    return True


def print_table(folder):
    for weights in FILES:
        there = "there" if (folder / weights.name).exists() else "not there"
        print(f"{weights.name:18} {weights.told_size:10} {there:10} licence {weights.licence}; {weights.what}\n"
              f"{'':18} SHA-256 {weights.sha256 or 'not published'}\n{'':18} {weights.url or ''}".rstrip())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these, with or without their endings: sd-v1-4, ViT-B-32, ViT-L-14, "
                        "resnet34_svhn, Classifier (default: all that have an address, 5.6 GB)")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the folder (default: hw2_data/weights, where the other scripts look)")
    parser.add_argument("--list", action="store_true", help="only tell the files, their sizes, licences, checksums and addresses")
    args = parser.parse_args()
    known = {key: weights for weights in FILES for key in (weights.name, Path(weights.name).stem)}
    for name in args.names:
        if name not in known:
            fail(f"no weights {name!r}; there are {', '.join(weights.name for weights in FILES)}")
    if args.list:
        print_table(args.output)
        return
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {args.output}: {error.strerror}")
    asked, failed = [known[name] for name in args.names] or [weights for weights in FILES if weights.url], []
    for weights in asked:
        if not weights.url and not (args.output / weights.name).exists():
            fail(f"{weights.name} comes with the assignment and has no public address: put it at {args.output / weights.name}")
        try:
            done = "downloaded" if download(weights, args.output) else "there already"
        except NotHad as error:
            if len(asked) == 1:
                fail(error)
            print(f"error: {error}", file=sys.stderr)
            failed.append(weights.name)
            continue
        print(f"{args.output / weights.name}: {done}{', checked' if weights.sha256 else ''} (licence: {weights.licence})", flush=True)
    if failed:
        fail(f"{', '.join(failed)} could not be had, as told above; run this again to go on")


if __name__ == "__main__":
    run(main)
