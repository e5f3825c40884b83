"""Downloads the course's data archive (about 1 GB) and unpacks it into hw2_data/. Run it again to go on after an interruption."""

import argparse
import errno
import os
import shutil
import time
import zipfile
from pathlib import Path

from common import ROOT, UserError, fail, files, run

HW2_DATA = ROOT / "hw2_data"
FILE_ID = "1W6Y1OmjzNw2qHoGDCpGOwGpw27wLg1fi"
EXPECTED = {  # path: at least so many files
    "digits/mnistm/data": 1000, "digits/svhn/data": 1000, "digits/mnistm/train.csv": 1, "digits/mnistm/val.csv": 1,
    "digits/svhn/train.csv": 1, "digits/svhn/val.csv": 1, "face/noise": 10, "face/GT": 10, "face/UNet.pt": 1,
    "clip_zeroshot/val": 50, "clip_zeroshot/id2label.json": 1, "textual_inversion/0": 1, "textual_inversion/1": 1,
    "textual_inversion/input.json": 1,
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HW2_DATA, help="the data folder (default: hw2_data)")
    parser.add_argument("--archive", type=Path, default=None, help="a hw2_data.zip that is already here; nothing is downloaded")
    args = parser.parse_args()
    if not problems(args.output):
        print(f"{args.output} is complete; nothing to do")
        return
    try:
        if args.archive:
            files.existing_file(args.archive, "archive")
        try:
            args.output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            fail(f"cannot make the folder {args.output}: {files.first_line(error)}")
        with files.lock(files.writable_folder(args.output)):
            archive = args.archive or download(args.output)
            kept = unpack(archive, args.output)
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(f"{error.filename or args.output} cannot be read or written: {files.first_line(error)}")
    for name in kept:
        print(f"what was there is kept as {name}")
    rest = "" if args.archive else f"; {archive} is no longer needed"
    print(f"{args.output} is complete{rest}\nnext: bash scripts/p1_train.sh  # on a GPU with --size base --steps 100000")


def problems(folder):
    """What the data folder lacks."""
    found = []
    for name, least in EXPECTED.items():
        path = folder / name
        try:
            count = sum(1 for _ in path.iterdir()) if os.path.isdir(path) else int(os.path.isfile(path) and os.path.getsize(path) > 0)
        except OSError as error:
            found.append(f"{path} cannot be looked into: {files.first_line(error)}")
            continue
        if count < least:
            found.append(f"{path} " + (f"has {count} files, expected at least {least}" if os.path.exists(path) else "does not exist"))
    return found


def download(folder):
    """The archive's path; a partial file is kept and continued by the next run."""
    import gdown

    archive = folder / "hw2_data.zip"
    if os.path.lexists(archive):
        if not zipfile.is_zipfile(archive):
            fail(f"{archive} is there and is no whole zip archive; move it away and run this again")
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
    """Unpacks beside the final place and, once everything is seen to be there, moves each part to it. A part of that name that is already there but is not
    whole is moved aside, and nothing is deleted. Returns the names of what was moved aside."""
    for stale in (path for path in folder.iterdir() if files.is_stale(path)):  # of a run that was killed
        shutil.rmtree(stale, ignore_errors=True)
    temporary = folder / files.temporary_name()
    try:
        try:
            with zipfile.ZipFile(archive) as file:
                check_size(file, folder)
                file.extractall(temporary)  # checks every file's checksum, and keeps names inside the folder
        except Exception as error:  # a damaged archive raises what its decoder pleases: zlib.error, or RuntimeError where it seems to be encrypted
            full = isinstance(error, OSError) and error.errno == errno.ENOSPC
            fail(f"{archive} cannot be unpacked ({error}); {'free some space' if full else 'delete it'} and run this again")
        top = temporary / "hw2_data" if (temporary / "hw2_data").is_dir() else temporary
        parts = [part for part in sorted({name.split("/")[0] for name in EXPECTED}) if any(is_of(part, name) for name in lacking(folder))]
        wrong = [what for name, what in lacking(top).items() if name.split("/")[0] in parts]
        if wrong:
            fail(f"{archive} is not the course's: unpacked, {wrong[0].replace(str(top), 'its part')}; delete it and run this again")
        return [aside for part in parts if (aside := replace(folder / part, top / part))]
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_of(part, name):
    return name.split("/")[0] == part


def lacking(folder):
    """{name of EXPECTED: what is wrong with it}"""
    return {name: what for what in problems(folder) for name in EXPECTED if what.startswith(f"{folder / name} ")}


def check_size(file, folder):
    """`OSError` where the archive holds more than the disk takes."""
    size, free = sum(info.file_size for info in file.infolist()), shutil.disk_usage(folder).free
    if size > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {size / 1e9:.1f} GB in it, {free / 1e9:.1f} GB free")


def replace(path, new):
    """Moves the folder `new` to `path`. What is there, be it a folder, a link or a file, is moved aside, and back where that fails; returns its new name."""
    aside = None
    if os.path.lexists(path):
        aside = path.with_name(f"{path.name}.before-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}")
        path.rename(aside)
    try:
        new.rename(path)
    except BaseException:
        if aside:
            aside.rename(path)
        raise
    return aside


if __name__ == "__main__":
    run(main)
