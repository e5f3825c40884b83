"""What is read: noises, pairs of states that p2_invert made, pictures cropped to squares."""

import numpy as np
from PIL import Image

from .files import MINI, UserError, existing_folder, note
from .pictures import decode, left_out, note_left_out, picture_files, read_picture
from .tensors import is_plain, read_tensors

MINI_DATA = MINI / "face"  # noise, GT, UNet.pt, as the course's folder has them


def read_noise(path):
    """A noise file, [1, 3, H, W] or [3, H, W] -> float32 [3, H, W]. Tensors saved on a GPU load on a CPU. Of a file of p2_invert, the first state."""
    noise = read_tensors(path, "noise tensor")
    if isinstance(noise, dict) and "states" in noise:
        return checked_pair(noise, path)["states"][0].float()
    if not is_plain(noise):
        raise UserError(f"{path} holds a {type(noise).__name__}, expected a plain (dense) float tensor [1, 3, H, W]")
    if tuple(noise.shape[:-2]) not in ((1, 3), (3,)) or not noise.is_floating_point():
        raise UserError(f"{path} holds a {noise.dtype} tensor {tuple(noise.shape)}, expected floating point [1, 3, H, W] or [3, H, W]")
    if noise.numel() > noise.untyped_storage().nbytes():  # one number that stands for very many: each takes a byte at least
        raise UserError(f"{path} holds {tuple(noise.shape)} values, but is too small for them")
    noise = noise.reshape(noise.shape[-3:]).float()
    if not noise.isfinite().all():
        raise UserError(f"{path} has values that are not finite; expected standard normal noise")
    return noise


def checked_pair(content, path):
    """What p2_ddim.edit's `invert` saves: {"states": float64 [2, 3, H, W], "range": float [2], the picture's lowest and highest value, "steps": int []}."""
    sizes = {"states": (2, 3, None, None), "range": (2,), "steps": ()}
    for name, size in sizes.items():
        value = content.get(name)
        if not (is_plain(value) and value.ndim == len(size) and all(n in (None, m) for n, m in zip(size, value.shape)) and value.isfinite().all()):
            raise UserError(f"{path} is not a file of p2_invert: its {name!r} is missing or damaged")
    return content


def read_noises(folder):
    """{name: noise [3, H, W]} of every *.pt in a folder, in name order; all of one size."""
    folder = existing_folder(folder, "folder of noises")
    noises = {path.stem: read_noise(path) for path in sorted(folder.glob("[!.]*.pt"))}
    if not noises:
        raise UserError(f"{folder} has no .pt files; expected noise tensors, 00.pt, 01.pt, ...")
    note_left_out(folder, left_out(folder, [f"{name}.pt" for name in noises], ()), "noises are named *.pt")
    refuse_sizes(noises, folder)
    return noises


def refuse_sizes(noises, folder):
    """A `UserError` where the noises, or pairs, {name: tensor}, of a folder are not all of one size."""
    first = next(iter(noises))
    for name, noise in noises.items():
        if noise.shape != noises[first].shape:
            raise UserError(f"{folder / name}.pt is {tuple(noise.shape)}, but {first}.pt is {tuple(noises[first].shape)}; all noises must have one size")


def read_noise_pairs(folder, num_steps, by=None):
    """({name: float64 [2, 3, H, W]}, {name: (lowest, highest) value of the picture}) of files that p2_invert made, for belm with this many steps.

    (None, {}) for a folder of plain noises. by: {"network": fingerprint, "dtype": name}, with which they are drawn: by another than they were inverted with,
    they do not give their pictures, which a note tells."""
    ranges, others = {}, set()

    def read(path):
        content = read_tensors(path, "noise tensor")
        if not (isinstance(content, dict) and "states" in content):
            return None
        content = checked_pair(content, path)
        if int(content["steps"]) != num_steps:
            raise UserError(f"{path} was inverted with {int(content['steps'])} steps: draw it with --steps {int(content['steps'])}")
        ranges[path.stem] = content["range"].tolist()
        others.update(what for what, value in (by or {}).items() if content.get(what, value) != value)
        return content["states"].double()

    paths = sorted(existing_folder(folder, "folder of noises").glob("[!.]*.pt"))
    pairs = {path.stem: read(path) for path in paths}
    if all(pair is None for pair in pairs.values()):
        return None, {}
    plain = [name for name, pair in pairs.items() if pair is None]
    if plain:
        raise UserError(f"{folder} mixes files of p2_invert with plain noises ({plain[0]}.pt); give them separate folders")
    refuse_sizes(pairs, folder)
    if others:
        note(f"{folder} was inverted with another {' and '.join(sorted(others))}: its pictures do not come back")
    return pairs, ranges


def square(picture, side):
    """A PIL picture as uint8 [H, W, 3]: with a side, its largest centred square brought to it, otherwise as it is."""
    if side:
        edge = min(picture.size)
        left, top = (picture.width - edge) // 2, (picture.height - edge) // 2
        picture = picture.resize((side, side), Image.Resampling.BOX if side <= edge else Image.Resampling.BICUBIC, (left, top, left + edge, top + edge))
    return np.asarray(picture)


def read_faces(folder, side):
    """Every picture in a folder, in name order, its largest centred square brought to side x side: uint8 [N, side, side, 3]."""
    known = set(Image.registered_extensions())
    paths = [path for path in picture_files(folder) if path.suffix.lower() in known]
    if not paths:
        raise UserError(f"{folder} has no pictures (.png, .jpg, .webp, ...)")
    note_left_out(folder, left_out(folder, paths))

    return np.stack(decode(paths, lambda path: square(read_picture(path), side), "pictures"))
