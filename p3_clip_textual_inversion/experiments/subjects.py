"""The field's benchmarks of subjects, as their authors publish them: DreamBench (Ruiz et al. 2023) and CustomConcept101 (Kumari et al. 2023).

    git clone https://github.com/google/dreambooth                          # dataset/: 30 subjects, 25 prompts for live ones, 25 for objects
    git clone https://github.com/adobe-research/custom-diffusion            # customconcept101/: 101 subjects, 101 pairs; its README has the pictures' address

Nothing in the files is executed: prompts_and_classes.txt is a Python program's text, of which lines are matched.
"""

import re
from dataclasses import dataclass
from math import gcd
from pathlib import Path

from ..files import UserError, existing_folder, first_line, read_json, shown
from ..pictures import picture_files

DREAMBENCH, SINGLES, PAIRS = "prompts_and_classes.txt", "dataset.json", "dataset_multiconcept.json"
LIVE = ("cat", "dog")  # the classes of DreamBench's nine live subjects
LAYOUTS = f"DreamBench's {DREAMBENCH}, or CustomConcept101's {SINGLES}"
TEXT_SCALE = 2.5  # of CustomConcept101's textual alignment: CLIPScore's (Hessel et al. 2021)
PUBLISHED = {  # {benchmark: (whose numbers, [(method, DINO, CLIP-I, CLIP-T as a cosine)])}; pictures of photographs, DINO ViT-S/16 and CLIP ViT-B/32
    "DreamBench": ("Ruiz et al. 2023, table 1; Custom Diffusion: Ma et al. 2023 (Subject-Diffusion), table 1", (
        ("real pictures", 0.774, 0.885, None), ("DreamBooth, Imagen", 0.696, 0.812, 0.306), ("DreamBooth, Stable Diffusion", 0.668, 0.803, 0.305),
        ("Custom Diffusion, Stable Diffusion", 0.643, 0.790, 0.305), ("Textual Inversion, Stable Diffusion", 0.569, 0.780, 0.255))),
    "CustomConcept101": ("customconcept101/README.md of adobe-research/custom-diffusion, Stable Diffusion v1.4, 50 steps", (
        ("DreamBooth", 0.5541, 0.7521, 0.7514 / TEXT_SCALE), ("Custom Diffusion", 0.5335, 0.7456, 0.7583 / TEXT_SCALE),
        ("Textual Inversion", 0.5128, 0.7530, 0.6117 / TEXT_SCALE))),
    "CustomConcept101, pairs": ("the same", (
        ("DreamBooth", 0.3849, 0.6636, 0.7366 / TEXT_SCALE), ("Custom Diffusion, optimised", 0.3684, 0.6595, 0.7599 / TEXT_SCALE),
        ("Custom Diffusion, joint", 0.3799, 0.6704, 0.7534 / TEXT_SCALE)))}
LISTED = re.compile(r"""(?P<quote>['"])(?P<text>.*)(?P=quote)\.format\(unique_token, class_token\),?""")


@dataclass(frozen=True)
class Subject:
    """name: as its folder; noun: its class, such as "stuffed animal"; prompts: texts with {} in the subject's place, far apart ones first."""
    name: str
    noun: str
    folder: Path
    prompts: tuple

    @property
    def token(self):
        return f"<{self.name}>"


@dataclass(frozen=True)
class Pair:
    """Two subjects in one picture. nouns: their classes here; prompts: texts with {0} and {1}."""
    subjects: tuple
    nouns: tuple
    prompts: tuple

    @property
    def name(self):
        return "+".join(subject.name for subject in self.subjects)


def read_benchmark(folder):
    """(name of the benchmark, [Subject], [Pair]) of a folder in either layout, or of the repository that has it; every file and folder checked."""
    folder = existing_folder(folder, "folder of a benchmark")
    folder = next((place for part in ("", "dataset", "customconcept101") for place in [folder / part]
                   if any((place / name).is_file() for name in (DREAMBENCH, SINGLES))), None) or refuse(folder, "has no list of subjects", LAYOUTS)
    listed = (folder / DREAMBENCH).is_file()
    subjects = read_dreambench(folder) if listed else read_singles(folder)
    for subject in subjects:
        if not subject.folder.is_dir():
            refuse(subject.folder, f"is not there, of which {DREAMBENCH if listed else SINGLES} tells", "the pictures of a subject")
        if not picture_files(subject.folder):
            refuse(subject.folder, "has no pictures", "some of the subject")
    pairs = read_pairs(folder, subjects) if (folder / PAIRS).is_file() else []
    return "DreamBench" if listed else "CustomConcept101", subjects, pairs


def refuse(path, what, expected):
    raise UserError(f"{path} {what}; expected {expected}")


def read_lines(path):
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {first_line(error)}") from None


def spread(prompts):
    """The same prompts, so that the first ones are far apart: benchmarks list one kind after another, and whoever draws a few wants some of each."""
    count = len(prompts)
    stride = next(k for k in range(max(round(0.382 * count), 1), count + 1) if gcd(k, count) == 1)
    return tuple(prompts[i * stride % count] for i in range(count))


def checked_prompt(text, fields, where):
    """A prompt with the first of its fields, such as ("{}",), and no other braces. One of CustomConcept101's tells its first subject twice, not the second."""
    rest = text
    for field in fields:
        rest = rest.replace(field, "")
    if fields[0] not in text or "{" in rest or "}" in rest:
        refuse(where, f"is {shown(text)}", f"a text with {' and '.join(fields)} in the place of what is drawn")
    return " ".join(text.split())


def checked_name(name, where):
    if not re.fullmatch(r"[\w-]{1,100}", name):
        refuse(where, f"names a subject {shown(name)}", "a folder's name of letters, digits, _ and -")
    return name


# ------------------------------------------------------------------ DreamBench

def read_dreambench(folder):
    """[Subject] of prompts_and_classes.txt: a table `subject_name,class` (a third column, as the miniature has it, tells live or object), then the prompts
    of objects and of live subjects, each a line 'a {0} {1} in the jungle'.format(unique_token, class_token)."""
    path = folder / DREAMBENCH
    rows, prompts, kind = [], {"object": [], "live": []}, None
    for number, line in enumerate(map(str.strip, read_lines(path)), 1):
        where = f"{path}, line {number},"
        if line in ("Object Prompts", "Live Subject Prompts"):
            kind = "object" if line.startswith("Object") else "live"
        elif kind is None and "," in line and not line.startswith("subject_name"):
            rows.append(read_row(line, where))
        elif kind and line not in ("", "prompt_list = [", "]"):
            found = LISTED.fullmatch(line)
            if not found:
                refuse(where, f"is {shown(line)}", "'a {0} {1} in the jungle'.format(unique_token, class_token)")
            prompts[kind].append(checked_prompt(found["text"].replace("{0} {1}", "{}"), ("{}",), where))
    if not rows or not all(prompts.values()):
        refuse(path, f"has {len(rows)} subjects, {len(prompts['object'])} prompts of objects and {len(prompts['live'])} of live subjects", "some of each")
    if len({name for name, *_ in rows}) < len(rows):
        refuse(path, "names a subject twice", "each once")
    return [Subject(name, noun, folder / name, spread(prompts[kind])) for name, noun, kind in rows]


def read_row(line, where):
    """(name, class, kind) of a line of the table."""
    name, noun, *kinds = (part.strip() for part in line.split(","))
    kind = kinds[0] if kinds else "live" if noun in LIVE else "object"
    if not noun or kind not in ("live", "object") or len(kinds) > 1:
        refuse(where, f"is {shown(line)}", "subject_name,class, and perhaps ,live or ,object")
    return checked_name(name, where), noun, kind


# ------------------------------------------------------------------ CustomConcept101

def read_singles(folder):
    """[Subject] of dataset.json: a list of {"class_prompt": "barn", "instance_data_dir": "./benchmark_dataset/scene_barn", "prompt_filename": ...}."""
    path, subjects = folder / SINGLES, {}
    for number, entry in enumerate(read_list(path)):
        where = f"{path}, entry {number},"
        noun, place, prompts = (text_of(entry, key, where) for key in ("class_prompt", "instance_data_dir", "prompt_filename"))
        name = checked_name(Path(place).name, where)
        if name in subjects:
            refuse(where, f"is {name} again", "each subject once")
        subjects[name] = Subject(name, noun, folder / place, read_prompts(folder / prompts, ("{}",)))
    return list(subjects.values())


def read_pairs(folder, subjects):
    """[Pair] of dataset_multiconcept.json: a list of [entry, entry, {"prompt_filename_compose": ...}], whose subjects are told by their folders."""
    path, known, pairs = folder / PAIRS, {subject.name: subject for subject in subjects}, {}
    for number, entry in enumerate(read_list(path)):
        where = f"{path}, entry {number},"
        if not isinstance(entry, list) or len(entry) != 3:
            refuse(where, "is no list of three", "two subjects and their prompt_filename_compose")
        names = tuple(Path(text_of(part, "instance_data_dir", where)).name for part in entry[:2])
        for name in names:
            if name not in known:
                refuse(where, f"has the subject {shown(name)}", f"two of the subjects of {folder}")
        nouns = tuple(text_of(part, "class_prompt", where) for part in entry[:2])
        prompts = read_prompts(folder / text_of(entry[2], "prompt_filename_compose", where), ("{0}", "{1}"))
        pair = Pair(tuple(known[name] for name in names), nouns, prompts)
        if len(set(names)) < 2 or pair.name in pairs:
            refuse(where, f"is {pair.name}{' again' if pair.name in pairs else ''}", "each pair once, of two subjects")
        pairs[pair.name] = pair
    return list(pairs.values())


def read_list(path):
    content = read_json(path)
    if not isinstance(content, list) or not content:
        refuse(path, "is no list of subjects", "CustomConcept101's, [{\"class_prompt\": ..., \"instance_data_dir\": ..., ...}, ...]")
    return content


def text_of(entry, key, where):
    value = entry.get(key) if isinstance(entry, dict) else None
    if not isinstance(value, str) or not value.strip() or ".." in Path(value).parts or Path(value).is_absolute():
        refuse(where, f"has no {key}, or an odd one", "a text, or a place below the folder")
    return value.strip()


def read_prompts(path, fields):
    """The prompts of a file, a line each, with these fields."""
    if not path.is_file():
        refuse(path, "is not there", f"a file of prompts with {' and '.join(fields)}")
    prompts = [checked_prompt(line, fields, f"{path}, line {number},") for number, line in enumerate(read_lines(path), 1) if line.strip()]
    return spread(list(dict.fromkeys(prompts))) if prompts else refuse(path, "is empty", "a prompt a line")
