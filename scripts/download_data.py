"""Downloads the course's data archive (about 1 GB) and unpacks it into hw2_data/. Run it again to go on after an interruption."""

import argparse
import errno
import shutil
import zipfile
from pathlib import Path

from common import ROOT, fail

HW2_DATA = ROOT / "hw2_data"
FILE_ID = "1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi"
EXPECTED = {  # path: at least so many files
    "digits/mnistm/data": 1000, "digits/svhn/data": 1000, "digits/mnistm/train.csv": 1, "digits/mnistm/val.csv": 1,
    "digits/svhn/train.csv": 1, "digits/svhn/val.csv": 1, "face/noise": 10, "face/GT": 10, "face/UNet.pt": 1,
    "clip_zeroshot/val": 50, "clip_zeroshot/id2label.json": 1, "textual_inversion/0": 1, "textual_inversion/1": 1,
    "textual_inversion/input.json": 1,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--output", type=Path, default=HW2_DATA, help="the data folder")
    parser.add_argument("--archive", type=Path, default=None, help="a hw2_data.zip that is already here; nothing is downloaded")
    args = parser.parse_args()
    if not problems(args.output):
        print(f"{args.output} is complete; nothing to do")
        return
    if args.archive and not args.archive.is_file():
        fail(f"no such archive: {args.archive}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        fail(f"cannot make the folder {args.output}: {error.strerror}")
    archive = args.archive or download(args.output)
    unpack(archive, args.output)
    found = problems(args.output)
    if found:
        fail(f"{archive} was unpacked to {args.output}, but {found[0]}; delete the archive and run this again")
    if not args.archive:
        archive.unlink()
    print(f"{args.output} is complete\nnext: bash scripts/p1_train.sh, with --size base on a GPU")


def problems(folder):
    """What the data folder lacks."""
    found = []
    for name, least in EXPECTED.items():
        path = folder / name
        count = sum(1 for _ in path.iterdir()) if path.is_dir() else int(path.is_file() and path.stat().st_size > 0)
        if count < least:
            found.append(f"{path} " + ("does not exist" if not path.exists() else f"has {count} files, expected at least {least}"))
    return found


def download(folder):
    """The archive's path; a partial file is kept and continued by the next run."""
    import gdown

    archive = folder / "hw2_data.zip"
    if archive.exists() and zipfile.is_zipfile(archive):
        return archive
    try:
        done = gdown.download(id=FILE_ID, output=str(archive), resume=True)
    except Exception as error:  # gdown lets every kind of network failure through
        done, reason = None, str(error).strip().splitlines()
    else:
        reason = []
    if not done:
        fail(f"the archive could not be downloaded ({reason[0] if reason else 'no answer'}). Without internet, get Google Drive file "
                 f"{FILE_ID} elsewhere and run this with --archive hw2_data.zip; the bundled hw2_data/mini needs no download")
    return archive


def unpack(archive, folder):
    """Unpacks beside the final place, then moves each part there, so that an interruption leaves nothing half unpacked."""
    temporary = folder / ".unpacking"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as file:
            file.extractall(temporary)  # checks every file's checksum, and keeps names inside the folder
    except Exception as error:  # a damaged archive raises what its decoder pleases: zlib.error, or RuntimeError where it seems to be encrypted
        shutil.rmtree(temporary, ignore_errors=True)
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        fail(f"{archive} cannot be unpacked ({error}); {'free some space' if full else 'delete it'} and run this again")
    top = temporary / "hw2_data" if (temporary / "hw2_data").is_dir() else temporary
    for part in sorted({name.split("/")[0] for name in EXPECTED}):
        if (top / part).exists():
            shutil.rmtree(folder / part, ignore_errors=True)
            (top / part).rename(folder / part)
    shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    main()
