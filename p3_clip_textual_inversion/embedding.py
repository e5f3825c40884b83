"""Learned words: new rows beside the token table of a frozen text encoder (textual inversion, Gal et al. 2023), and their files.

A concept is one word of the prompt, such as <new1>, and one or several vectors. As in diffusers, the further vectors of <new1> are the tokens
<new1>_1, <new1>_2, ..., and every <new1> of a prompt is written out as all of them.
"""

import re
import shutil
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F

from .custom_diffusion import tell_projections
from .files import ROOT, UserError, atomic_path, note
from .formats.words import read_words, word_files
from .lora import ENDING, lora_file, read_lora
from .provenance import script_line
from .tensors import save_tensors

INSTALLED = Path(__file__).parent / "embeddings"  # the words that drawing finds unasked, a folder for each model's; git keeps them


class LearnedEmbedding(torch.nn.Module):
    """The token table with new rows after its end. The table is never a parameter to learn, so it stays bit-identical; `rows` [n, dim] is all that learns.

    ids: of the new rows; one that the table has too, as that of a word which a training wrote into the model, means the new row."""

    def __init__(self, table, rows, ids=None):
        super().__init__()
        self.table = table.requires_grad_(False)
        self.rows = torch.nn.Parameter(rows.detach().clone().to(table.weight))
        ids = list(ids or range(table.num_embeddings, table.num_embeddings + len(rows)))
        row_of = torch.full((max(table.num_embeddings, max(ids) + 1),), -1)
        row_of[ids] = torch.arange(len(rows))
        self.register_buffer("row_of", row_of.to(table.weight.device), persistent=False)  # -1: none, the table's own

    @property
    def weight(self):  # transformers and diffusers read a dtype and a device here
        return self.table.weight

    def forward(self, ids):
        """int [B, N] -> [B, N, dim]"""
        old = self.table(ids.clamp(max=self.table.num_embeddings - 1))
        new = F.embedding(self.row_of[ids].clamp(min=0), self.rows)
        return torch.where(self.is_new(ids)[..., None], new, old)

    def is_new(self, ids):
        """bool, like ids: which tokens are learned words'."""
        return self.row_of.to(ids.device)[ids] >= 0


def tokens_of(word, count):
    """The tokens of a word of `count` vectors: <new1>, <new1>_1, ..."""
    return [word, *(f"{word}_{i}" for i in range(1, count))]


def check_words(words, tokenizer):
    """Refuses words that cannot become tokens of their own."""
    known = {token for token, number in tokenizer.get_vocab().items() if number < tokenizer.vocab_size}  # later ones a training wrote there
    for word in words:
        if not word or word.split() != [word]:
            raise UserError(f"the token name {word!r} must be one word without spaces, such as <new1>")
        if word in known or f"{word}</w>" in known:
            raise UserError(f"the model itself already knows the word {word!r}, from its vocabulary; choose another, "
                            f"such as <my-{re.sub('[^a-z0-9]', '', word.lower()) or 'word'}>")
        if any(word != other and other in word for other in words):
            raise UserError(f"the token name {word!r} contains another one; choose names of which none is part of another")
    if len(set(words)) != len(words):
        raise UserError(f"the token names {', '.join(words)} must differ")


def add_words(parts, vectors):
    """Adds words {word: [n, dim]} to a `StableDiffusion`; returns the `LearnedEmbedding`, whose rows stand in the words' order. Once per model."""
    check_words(list(vectors), parts.tokenizer)
    table = parts.text_encoder.get_input_embeddings()
    if isinstance(table, LearnedEmbedding):
        raise ValueError("the words of a model can be added once only")
    for word, rows in vectors.items():
        if rows.ndim != 2 or rows.shape[1] != table.embedding_dim:
            raise UserError(f"the embedding of {word} is {tuple(rows.shape)}; this model's words have {table.embedding_dim} dimensions, expected "
                            f"[vectors, {table.embedding_dim}]: learn it with this model (scripts/p3_train.sh)")
        most = parts.tokenizer.model_max_length - 4  # start, end, and a word on either side
        if len(rows) > most:
            raise UserError(f"{word} has {len(rows)} vectors, but a prompt of this model holds {most + 4} tokens in all; expected at most {most} (--vectors)")
    tokens = [token for word, rows in vectors.items() for token in tokens_of(word, len(rows))]
    parts.tokenizer.add_tokens(tokens)
    ids = parts.tokenizer.convert_tokens_to_ids(tokens)
    if parts.tokenizer.vocab_size > table.num_embeddings or min(ids) < parts.tokenizer.vocab_size:
        raise UserError(f"the tokenizer has {parts.tokenizer.vocab_size} tokens and numbers the new words {ids}, but the token table ends at "
                        f"{table.num_embeddings}; tokenizer and text encoder do not belong together")
    learned = LearnedEmbedding(table, torch.cat(list(vectors.values())), ids)
    parts.text_encoder.set_input_embeddings(learned)
    for word, rows in vectors.items():
        if sum(number in ids for number in parts.tokenizer(expand(f"a {word} b", {word: len(rows)})).input_ids) != len(rows):
            raise UserError(f"the tokenizer does not read {word!r} as a token of its own; choose another name, such as <new1>")
    return learned


def expand(prompt, counts):
    """Writes every learned word of a prompt out as all its tokens. counts: {word: number of vectors}."""
    for word, count in counts.items():
        prompt = prompt.replace(word, " ".join(tokens_of(word, count)))
    return prompt


def initial_rows(parts, words, count, generator=None):
    """[count, dim] to start from: the tokens of `words`, repeated or averaged to fit; noise of ordinary length if `words` is None or empty."""
    table = parts.text_encoder.get_input_embeddings().weight.detach().float().cpu()
    if not words:
        noise = torch.randn(count, table.shape[1], generator=generator)
        return noise / noise.norm(dim=1, keepdim=True) * ordinary_norm(parts)
    rows = table[parts.tokenizer(words, add_special_tokens=False).input_ids]
    if len(rows) == 0:
        raise UserError(f"the initial words {words!r} hold no token")
    # as many groups of neighbouring tokens as there are vectors; where there are fewer tokens, they take turns
    chunks = rows.tensor_split(count) if count <= len(rows) else [rows[i % len(rows)][None] for i in range(count)]
    length = rows.norm(dim=1).mean()
    return torch.stack([F.normalize(chunk.mean(0), dim=0) * length for chunk in chunks])


def ordinary_norm(parts):
    """The median length of the token table's rows."""
    return parts.text_encoder.get_input_embeddings().weight.detach().float().norm(dim=1).median().item()


def file_of(folder, word):
    """The file of a word: the word itself, without what file systems refuse. Some programs take a file's name for the word."""
    return Path(folder) / (re.sub(r'[<>:"/\\|?*\s]', "", word) + ".safetensors")


def check_files(words):
    """Refuses words whose files would be hidden, or one and the same."""
    names = [file_of("", word).name for word in words]
    for word, name in zip(words, names):
        if name.startswith("."):
            raise UserError(f"the token name {word!r} gives its file no name; choose one with letters or digits, such as <new1>")
        if name.endswith(ENDING):
            raise UserError(f"the token name {word!r} gives its file the name {name}, as its weights of low rank have; choose one that does not end in _lora")
    if len({name.lower() for name in names}) != len(names):
        raise UserError(f"the token names {', '.join(words)} must differ in more than what a file's name cannot hold or tell apart; "
                        f"their files would be {', '.join(names)}")


def save_embedding(path, word, rows, metadata=None):
    """One tensor, {word: [n, dim]} float32: what diffusers' load_textual_inversion and common web UIs read. metadata: {str: str}."""
    save_tensors(path, {word: rows.float()}, metadata)


def read_embedding(path):
    """(word, rows [n, dim] float32, metadata) of a file of one word; the word is "" where the file does not tell it."""
    found, _, metadata = read_words(path)
    if len(found) != 1:
        raise UserError(f"{path} has {len(found)} words; expected one")
    (word, rows), = found.items()
    return word, rows, metadata


def model_name(row, identity):
    """By which a word's file tells the model that it was learned with: its row of the table, token table and UNet, such as sd_v1-0123456789ab-0123456789ab."""
    return f"{row.key}-{identity}"


def installed_folder(name):
    """The folder of the words of models with the token table of this one. name: of `model_name`"""
    return INSTALLED / name.rpartition("-")[0]


def models_of(folder):
    """{file: (word, name of its model or None)} of the files of one word in a folder, or of one file; what is no word's file is left out."""
    found = {}
    for path in word_files(folder):
        with suppress(UserError):
            word, _, metadata = read_embedding(path)
            found[path] = word, told_model(metadata)
    return found


def told_model(metadata):
    """The name of a word's model that its file tells, or None."""
    model = metadata.get("model", "")
    return model if re.fullmatch(r"\w+-[0-9a-f]{12}-[0-9a-f]{12}", model) else None


def check_models(found, words, name):
    """Notes, a line each, on the words of files, {path: (word, name of its model or None)}, that were learned with another model than the one of this name."""
    notes = []
    for path, (word, model) in found.items():
        if word not in words or model in (None, name):
            continue
        if model.split("-")[1] != name.split("-")[1]:
            notes.append(f"note: {word} of {path} was learned with another model ({model}, this one is {name}): here it means something else; "
                         "learn it with this one (scripts/p3_train.sh)")
        else:
            notes.append(f"note: {word} of {path} was learned with another UNet of the same text encoder ({model}, this one is {name}): it may show less of "
                         "its concept")
    return notes


def note_models(origin, name):
    """A note on each word of `gather`'s origin, {word: (its file, its metadata)}, that was learned with another model than the one of this name."""
    for line in check_models({path: (word, told_model(metadata)) for word, (path, metadata) in origin.items()}, origin, name):
        note(line.removeprefix("note: "))


def find_words(name, command):
    """The folder of the installed words of the model of this name. command: what learns and installs some, for who has none."""
    folder = installed_folder(name)
    if models_of(folder):
        return folder
    runs = {path.parent for path in (ROOT / "runs").glob("*/[!.]*.safetensors") if (models_of(path).get(path) or (0, ""))[1] == name}
    learned = f"learn them with: {command}"
    if runs:
        learned = f"{', '.join(map(str, sorted(runs)))} has some: give it by --embeddings, or install it with {script_line('install.sh', min(runs))}"
    raise UserError(f"no words are installed for this model ({folder} has none); {learned}")


def install(source, name=None):
    """Copies the words of a folder (or file) to where drawing finds them. name: of their model, where their files do not tell it.

    Returns the paths. Another word of the same name, installed before, is kept in the folder `replaced`."""
    found = models_of(source)
    if not found:
        if Path(source).is_file():
            read_embedding(source)  # which tells what is wrong with it
        raise UserError(f"{source} has no words; expected .safetensors files, as scripts/p3_train.sh writes them")
    installed = []
    for path, (word, model) in found.items():
        _, rows, told = read_embedding(path)
        if not word:
            raise UserError(f"{path} does not tell its word; draw with it by --embeddings '<new1>={path}'")
        if not (model or name):
            raise UserError(f"{path} does not tell which model {word} was learned with; give that by --checkpoint")
        target = installed_folder(model or name) / file_of("", word).name
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.is_file() and not ((there := read_embedding(target))[1].equal(rows) and there[2] == told):
            keep_replaced(target)
        tell_projections(None, {word: (path, told)})
        save_embedding(target, word, rows, told)
        installed += [target, *install_lora(lora_file(path), lora_file(target))]
    return installed


def keep_replaced(path):
    """Copies an installed file that another will take the place of into the folder `replaced`."""
    replaced = path.parent / "replaced"
    replaced.mkdir(exist_ok=True)
    shutil.copyfile(path, next(p for i in range(10**6) if not (p := replaced / f"{path.stem}_{i}.safetensors").exists()))


def install_lora(source, target):
    """Installs the weights beside a word; where it has none, those of an older word are put aside, which do not fit it. Returns [target], or []."""
    new, old = (path.read_bytes() if path.is_file() else None for path in (source, target))
    if old not in (None, new):
        keep_replaced(target)
        target.unlink()
    if new is not None and new != old:
        read_lora(source)  # nothing damaged takes a place
        with atomic_path(target) as temporary:
            temporary.write_bytes(new)
    return [target] if new is not None else []


def nearest_words(parts, rows, count=3):
    """For each row [n, dim]: the `count` ordinary tokens with the largest cosine, [(token, cosine), ...]."""
    table = parts.text_encoder.get_input_embeddings().weight.detach().float().cpu()
    cosine = F.normalize(rows.float().cpu(), dim=1) @ F.normalize(table, dim=1).T
    top = cosine.topk(count, dim=1)
    return [[(token.removesuffix("</w>"), value) for token, value in zip(parts.tokenizer.convert_ids_to_tokens(ids.tolist()), values.tolist())]
            for ids, values in zip(top.indices, top.values)]
