"""Features that stay: a picture or caption that a CLIP has read once is not read again, by any later command.

One safetensors file for each CLIP and number format, in the user's cache folder ($XDG_CACHE_HOME or ~/.cache). A picture is known by the SHA-256 of its
file, so a changed one is read again; a CLIP by that of its files, which are hashed again only when their size or time of change is another.
"""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..clip import Grader
from ..files import UserError, atomic_path, first_line, note
from ..formats.memo import Memo, cache_folder

LAYOUT = 1  # of what is kept and of how pictures are decoded: with another number everything is computed again
MODEL_FILES = (".json", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".txt", ".gz", ".model")
MOST = 100_000  # pictures, and captions, that are kept for a CLIP


def digest(path):
    """SHA-256 of a file, bytes."""
    found = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found.update(block)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    return found.digest()


def make_grader(model, pretrained, device, dtype, cache=True):
    """A `CachedGrader`, or with cache=False, or where nothing can be kept, a plain `Grader`."""
    if cache:
        try:
            return CachedGrader(model, pretrained, device, dtype)
        except (OSError, RuntimeError, UserError) as error:  # no home, no place
            note(f"features are not kept: {first_line(error)}")
    return Grader(model, pretrained, device, dtype)


def identity_of(name, pretrained, memo):
    """What tells one CLIP from another: the contents of its files; of published weights, their name. memo: of the files' digests."""
    files = [Path(part) for part in (name, pretrained) if part and Path(part).is_file()]
    if Path(name).is_dir():
        files += sorted(path for path in Path(name).iterdir() if path.suffix in MODEL_FILES and path.is_file())
    names = [str(part) for part in (name, pretrained) if part and not Path(part).exists()]
    return [*names, *([path.name, memo.of([path], lambda path=path: digest(path).hex())] for path in files)]


class CachedGrader:
    """A `Grader` that reads only what it has not read before, and loads its CLIP only then."""

    def __init__(self, model, pretrained=None, device="cpu", dtype=torch.float32, folder=None):
        folder = folder or cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        self.load = lambda: Grader(model, pretrained, device, dtype)  # at the first picture or caption that is new
        self.grader, self.dtype = None, dtype
        key = json.dumps([LAYOUT, identity_of(str(model), pretrained, Memo(folder / "hashes.json")), torch.device(device).type, str(dtype),
                          version("open_clip_torch"), version("torch"), version("pillow")])
        self.path = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
        self.kept = {"pictures": {}, "captions": {}}
        try:
            with safe_open(self.path, "pt") as file:
                self.scale, self.bias = json.loads(file.metadata()["logits"])
                for kind in self.kept:
                    hashes, features = file.get_tensor(f"{kind}_hashes").numpy(), file.get_tensor(kind)
                    if features.dtype != torch.float32 or len(hashes) != len(features) or not features.isfinite().all():
                        raise ValueError("not what was written")
                    self.kept[kind] = {row.tobytes(): feature for row, feature in zip(hashes, features)}
        except Exception:  # there is none yet, or it is damaged, whatever its reader raises then
            self.scale = None
            self.kept = {"pictures": {}, "captions": {}}

    def loaded(self):
        self.grader = self.grader or self.load()
        self.scale, self.bias = self.grader.logits
        return self.grader

    @property
    def logits(self):
        """As `Grader` has it."""
        if self.scale is None:
            self.loaded()
        return self.scale, self.bias

    @property
    def files_read(self):
        return self.grader.files_read if self.grader else 0

    def of_files(self, paths, **options):
        """As `Grader` has it."""
        return self.remember("pictures", [digest(path) for path in paths], lambda rows: self.loaded().of_files([paths[row] for row in rows], **options))

    def of_texts(self, texts):
        """As `Grader` has it."""
        keys = [hashlib.sha256(text.encode()).digest() for text in texts]
        return self.remember("captions", keys, lambda rows: self.loaded().of_texts([texts[row] for row in rows]))

    def remember(self, kind, keys, compute):
        """Features [len(keys), dim] by their keys, those that are missing computed from their rows and kept."""
        kept = self.kept[kind]
        missing = list({key: row for row, key in enumerate(keys) if key not in kept}.values())
        if missing:
            kept |= dict(zip((keys[row] for row in missing), compute(missing)))
            self.save()
        return torch.stack([kept[key] for key in keys])

    def save(self):
        tensors = {}
        for kind, kept in self.kept.items():
            rows = list(kept.items())[-MOST:]
            hashes = bytearray(b"".join(key for key, _ in rows))
            tensors[f"{kind}_hashes"] = torch.frombuffer(hashes, dtype=torch.uint8).reshape(-1, 32) if rows else torch.empty(0, 32, dtype=torch.uint8)
            tensors[kind] = torch.stack([feature for _, feature in rows]) if rows else torch.empty(0, 1)
        try:
            with atomic_path(self.path) as temporary:
                save_file(tensors, temporary, metadata={"logits": json.dumps([self.scale, self.bias])})
        except UserError as error:  # a full disk takes the time of the next command, not this one's results
            note(f"features are not kept: {error}")
