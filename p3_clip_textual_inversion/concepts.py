"""What is learned and what is drawn, as the course's two files tell it: input.json, and the prompts.json of its later challenge.

input.json has an entry a concept: one word, a list of prompts, and a folder of example pictures beside the file that has the entry's number for a name.
prompts.json has an entry a picture: one prompt and all its concepts, each used by any number of entries; their pictures lie in concept_image/{src_image}/.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from .files import UserError, read_json

CHALLENGE_IMAGES = "concept_image"


@dataclass(frozen=True)
class Concept:
    """What one word stands for. number: what its run and --concepts call it, an input.json's key or the folder in concept_image; folder: of its pictures;
    src_image: what it is called in ordinary words, with which learning begins; prompts: all that have the word, eval_prompts: the same in ordinary words."""
    number: str
    folder: Path
    src_image: str
    token: str
    prompts: list
    eval_prompts: list
    baseline: list | None = None

    @property
    def kind(self):
        """style, where each of its prompts says "in the style of <word>", or "in a <word> style"; otherwise object."""
        token = re.escape(self.token)
        return "style" if all(re.search(rf"style of (the )?{token}|{token}[- ]style", prompt) for prompt in self.prompts) else "object"


def kind_of(concept, told="auto"):
    """Whether a concept is an "object" or a "style": as told or, with "auto", as its prompts say."""
    return concept.kind if told == "auto" else told


@dataclass(frozen=True)
class Entry:
    """What is drawn and graded together. number: its key; concepts: of its prompts; baseline: [(image score, text score)] of each prompt, or None;
    challenge: of a prompts.json, with one prompt."""
    number: str
    concepts: tuple
    prompts: list
    eval_prompts: list
    baseline: list | None
    challenge: bool

    @property
    def token(self):
        """All its words."""
        return " ".join(concept.token for concept in self.concepts)

    def picture(self, prompt, i):
        """Where picture i of a prompt lies, below the folder of all."""
        return picture_path(self.number, prompt, i, self.challenge)


def picture_path(number, prompt, i, challenge=False):
    """Where the contract wants picture i of an entry's prompt; a challenge's pictures may have any name."""
    return f"{number}/{i:02d}.png" if challenge else f"{number}/{prompt}/source{number}_prompt{prompt}_{i}.png"


def read_entries(path):
    """The entries of an input.json or a prompts.json, in its order, each checked."""
    path = Path(path)
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise UserError(f'{path} must be an object of concepts, {{"0": {{"token_name": "<new1>", "prompt": ["..."], ...}}, ...}}')
    entries = []
    for number, entry in content.items():
        where = f"{path}, concept {number!r}"
        check_name(number, where, "the name")
        if not isinstance(entry, dict):
            raise UserError(f"{where} must be an object with token_name and prompt")
        challenge = any(isinstance(entry.get(key), list) for key in ("token_name", "src_image"))
        entries.append((challenge_entry if challenge else course_entry)(path, number, entry))
    return unite(path, entries)


def concepts_of(path, chosen=None):
    """What the entries of a file are of, each concept once; of the names `chosen`, if any are."""
    known = {concept.number: concept for entry in read_entries(path) for concept in entry.concepts}
    for name in chosen or ():
        if name not in known:
            raise UserError(f"{path} has no concept {name!r}; it has {', '.join(known)}")
    return [concept for name, concept in known.items() if name in (chosen or known)]


def read_concepts(path):
    """The concepts of an input.json, for what knows prompts of one word only."""
    if read_entries(path)[0].challenge:
        raise UserError(f"{path} is the prompts.json of the challenge of several concepts in a picture, which p3_train, p3_infer and p3_grade read; expected "
                        "an input.json here: one word and a list of prompts for each concept")
    return concepts_of(path)


def check_name(name, where, what):
    """Refuses what cannot be a folder's name."""
    if not name.isprintable() or not name or Path(name).name != name or name in (".", ".."):
        raise UserError(f"{where}: {what} must do as a folder's" + (f", which {name!r} does not" if what != "the name" else ""))


def check_token(token, prompts, where):
    if token.split() != [token]:
        raise UserError(f"{where}: the token {token!r} must be one word without spaces, such as <new1>")
    for prompt in prompts:
        if token not in prompt:
            raise UserError(f"{where}: the token {token!r} is not in the prompt {prompt!r}")


def is_texts(value):
    return isinstance(value, list) and bool(value) and all(isinstance(text, str) and text.strip() for text in value)


def is_score(value):
    """A number that can be printed: JSON also has NaN, Infinity and whole numbers of any length."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9


def course_entry(path, number, entry):
    """An `Entry` of input.json."""
    where = f"{path}, concept {number!r}"
    for key in ("token_name", "src_image"):
        if not isinstance(entry.get(key, "" if key == "src_image" else None), str):
            raise UserError(f"{where}: {key} must be a text")
    prompts, token = entry.get("prompt"), entry["token_name"]
    evals = entry.get("prompt_4_clip_eval", prompts)
    for key, value in (("prompt", prompts), ("prompt_4_clip_eval", evals)):
        if not is_texts(value):
            raise UserError(f"{where}: {key} must be a list of texts")
    if len(evals) != len(prompts):
        raise UserError(f"{where} has {len(prompts)} prompts, but {len(evals)} in prompt_4_clip_eval")
    check_token(token, prompts, where)
    baseline = entry.get("baseline")
    if baseline is not None and not (isinstance(baseline, list) and len(baseline) == len(prompts) and all(
            isinstance(pair, list) and len(pair) == 2 and all(map(is_score, pair)) for pair in baseline)):
        raise UserError(f"{where}: baseline must be a pair [image score, text score] for each of the {len(prompts)} prompts")
    concept = Concept(number, path.parent / number, entry.get("src_image", ""), token, prompts, evals, baseline)
    return Entry(number, (concept,), prompts, evals, baseline, challenge=False)


def challenge_entry(path, number, entry):
    """An `Entry` of prompts.json."""
    where = f"{path}, entry {number!r}"
    names, tokens = entry.get("src_image"), entry.get("token_name")
    for key, value in (("src_image", names), ("token_name", tokens)):
        if not is_texts(value):
            raise UserError(f'{where}: {key} must be a list of texts, such as {"["}"{"cat2" if key == "src_image" else "<cat2>"}"{"]"}')
        if len(set(value)) != len(value):
            raise UserError(f"{where}: {key} has {next(text for text in value if value.count(text) > 1)!r} twice")
    if len(names) != len(tokens):
        raise UserError(f"{where} has {len(names)} in src_image, but {len(tokens)} in token_name")
    for name in names:
        check_name(name, where, "src_image")
    prompt = one_text(entry, "prompt", where)
    for token in tokens:
        check_token(token, [prompt], where)
    other = next((word for word in re.findall(r"<[^<>\s]+>", prompt) if word not in tokens), None)
    if other:
        raise UserError(f"{where}: the prompt has {other}, which token_name does not have")
    plain = prompt
    for name, token in zip(names, tokens):
        plain = plain.replace(token, as_words(name))
    plain = one_text(entry, "prompt_4_clip_eval", where) if "prompt_4_clip_eval" in entry else plain
    called = called_in(prompt, plain, tokens)
    concepts = tuple(Concept(name, path.parent / CHALLENGE_IMAGES / name, called.get(token, ""), token, [prompt], [plain])
                     for name, token in zip(names, tokens))
    return Entry(number, concepts, [prompt], [plain], None, challenge=True)


def one_text(entry, key, where):
    """The one text of a field, also where it stands in a list."""
    value = entry.get(key)
    if isinstance(value, list) and len(value) != 1 and all(isinstance(text, str) for text in value):
        raise UserError(f"{where} has {len(value)} texts in {key}; expected one")
    value = value[0] if isinstance(value, list) else value
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {key} must be a text")
    return value


def as_words(name):
    """The name of a folder in words: pet_cat1 is a pet cat."""
    return " ".join(re.sub(r"[\d_\W]+", " ", name).split()) or name


def called_in(prompt, plain, tokens):
    """{token: what stands in its place in the same prompt in ordinary words}; empty where the prompts differ in anything else."""
    prompt, plain = (" ".join(text.split()).rstrip(" .") for text in (prompt, plain))
    pieces = re.split("(" + "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) + ")", prompt)  # a text, a token, a text, ..., a text
    found, at = {}, 0
    for i in range(0, len(pieces), 2):  # from text to text: a pattern of the whole could take for ever where nothing fits
        text = re.escape(pieces[i])
        text = re.compile(text if i < len(pieces) - 1 else f"{text}$", re.IGNORECASE)
        match = text.search(plain, at + 1) if i else text.match(plain)
        if not match:
            return {}
        if i:
            found.setdefault(pieces[i - 1], re.sub(r"^(an?|the) ", "", plain[at:match.start()].strip(), flags=re.IGNORECASE))
        at = match.end()
    return found


def unite(path, entries):
    """The entries, whose concepts of one name are one and know all prompts that they are in."""
    if len({entry.challenge for entry in entries}) > 1:
        raise UserError(f"{path} has entries of an input.json and of a prompts.json; expected src_image and token_name as texts in all, or as lists in all")
    united, owner = {}, {}
    for entry in entries:
        for concept in entry.concepts:
            first = united.get(concept.number)
            if entry.challenge and ((first or concept).token != concept.token or owner.setdefault(concept.token, concept.number) != concept.number):
                other = f"{first.token} of {first.number!r}" if first and first.token != concept.token else f"{concept.token} of {owner[concept.token]!r}"
                raise UserError(f"{path}, entry {entry.number!r} has {concept.token} of {concept.number!r}, another entry {other}; expected one word for each")
            united[concept.number] = replace(first, src_image=first.src_image or concept.src_image, prompts=first.prompts + concept.prompts,
                                             eval_prompts=first.eval_prompts + concept.eval_prompts) if first else concept
    if entries[0].challenge:
        united = {name: replace(concept, src_image=concept.src_image or as_words(name)) for name, concept in united.items()}
    return [replace(entry, concepts=tuple(united[concept.number] for concept in entry.concepts)) for entry in entries]


def refuse_examples(output, path, concepts):
    """A `UserError` where a run would write among the example pictures of a file of concepts: into a folder of theirs."""
    output, folders = Path(output).resolve(), [concept.folder.resolve() for concept in concepts]
    if any(output in (folder, folder.parent) for folder in folders):
        raise UserError(f"{output} is the folder of the example pictures of {path}; choose another to write into")
