"""Files of learned words as anyone saves them, read without running any code: ours and diffusers', the web UI's, kohya's, and those of homework solutions."""

import os
import re
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import CLIPTokenizer

from ..files import UserError, existing_file, first_line, note
from ..lora import ENDING, is_lora
from ..tensors import is_finite, is_plain, read_tensors, what_is
from .identity import TOKEN_TABLE, VOCABULARY, part_file, read_some

SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
NAMELESS = ("emb_params", "embedding", "embeddings", "embeds", "learned_embeds", "learned_embedding", "weight", "vector", "vectors", "delta", "difference", "*")
TOKENS = ("tokens", "token", "placeholder_token", "placeholder_tokens", "token_name", "name")  # beside "embeddings": whose they are
INITIAL = ("initializer_token", "initial_word", "initial_token", "init_word", "init_token")  # beside a difference: to whose row
NUMBERS = ("token_ids", "token_id", "step", "steps", "epoch")  # beside vectors, perhaps as tensors
MOST_WORDS = 200  # in a file: what has more is a model
OTHERS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion 2", 1280: "the second text encoder of Stable Diffusion XL"}  # by the numbers of a word's vector


class ForeignWord(UserError):
    """Of a file that is whole, but whose words are another model's."""


def word_files(source):
    """The files of a folder that may hold words, or the file itself."""
    source = Path(source)
    if os.path.isfile(source):
        return [source]
    if not os.path.isdir(source):
        return []
    return sorted(path for path in source.glob("[!.]*") if path.suffix.lower() in SUFFIXES and not path.name.endswith(ENDING) and os.path.isfile(path))


def read_words(path):
    """({word: rows [n, dim] float32}, {word: the word whose row they are added to}, metadata) of a file; the word is "" where the file does not tell it."""
    path = existing_file(path, "embedding")
    content = read_tensors(path, "learned word", "a file of one word's vectors", foreign=True)
    if isinstance(content, dict) and is_lora(content):
        raise UserError(f"{path} is no word but weights (LoRA); give it by --lora")
    metadata = {}
    if what_is(path)[0] == "safetensors":
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    found = {}
    for name, tensor in words_of(content, path).items():
        word, rows = name if name not in NAMELESS and not name.endswith(".weight") else "", tensor
        if rows.ndim == 2 and len(rows) > VOCABULARY:
            rows = rows[VOCABULARY:]  # a whole token table, with what was added at its end
        rows = rows[None] if rows.ndim == 1 else rows
        if word and word.split() != [word]:
            raise UserError(f"{path} names its word {word!r}; expected one word without spaces, such as <new1>")
        if not is_plain(rows) or rows.ndim != 2 or not rows.is_floating_point() or 0 in rows.shape or not is_finite(rows.float()):
            raise UserError(f"{path} holds {word or name or 'a tensor'} as {rows.dtype} {tuple(rows.shape)}; expected finite floating point [vectors, dim]")
        first = re.sub(r"_\d+$", "", word)  # <new1>_1, <new1>_2, ... are the further vectors of <new1>
        word = first if first in found else word
        if word in found and rows.shape[1] != found[word].shape[1]:
            raise UserError(f"{path} holds {word or 'a word'} in vectors of {found[word].shape[1]} and of {rows.shape[1]} numbers; expected one length")
        found[word] = torch.cat([found[word], rows.detach().float()]) if word in found else rows.detach().float()
    initial = next((content[key] for key in INITIAL if isinstance(content, dict) and isinstance(content.get(key), str)), None)
    told = isinstance(content, dict) and any(key in content for key in ("delta", "difference"))
    return found, dict.fromkeys(found, initial) if initial and told else {}, metadata


def own_words(source):
    """{word: rows [n, dim] float32} that a training wrote into a model of diffusers' itself, behind its tokenizer's own vocabulary."""
    if not os.path.isdir(source):
        return {}
    try:
        tokenizer = CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", local_files_only=True)
    except Exception as error:  # a damaged file makes its reader raise anything
        raise UserError(f"cannot load Stable Diffusion from {source}: {first_line(error)}") from None
    added = sorted((number, token) for token, number in tokenizer.get_added_vocab().items() if number >= tokenizer.vocab_size)
    table, found = read_some(part_file(source, *TOKEN_TABLE[1::2]), [TOKEN_TABLE[2]])[0] if added else (), {}
    for number, token in added:
        first = re.sub(r"_\d+$", "", token)
        if number < len(table):
            found.setdefault(first if first in found else token, []).append(table[number].float())
    return {word: torch.stack(rows) for word, rows in found.items()}


def words_of(content, path):
    """{name: tensor} of a file's content, in whichever of the layouts it is."""
    if isinstance(content, torch.Tensor):
        return {"": content}
    if not isinstance(content, dict):
        raise UserError(f"{path} holds {type(content).__name__}, no learned word; expected a tensor, or tensors by name")
    if isinstance(content.get("string_to_param"), dict):  # the web UI's: the word is its name, the parameter is always called *
        content = {content["name"] if isinstance(content.get("name"), str) else "": next(iter(content["string_to_param"].values()), None)}
    if {"clip_l", "clip_g"} & content.keys():
        raise ForeignWord(f"{path} is a word of Stable Diffusion XL, with two text encoders; expected one of Stable Diffusion v1")
    for key in ("learned_embeds", "embeddings", "modifier_token"):
        if isinstance(content.get(key), dict):
            content = content[key]
    tokens = next((content[key] for key in TOKENS if isinstance(content.get(key), (str, list, tuple))), ())
    tokens = [tokens] if isinstance(tokens, str) else list(tokens)
    named = {name: tensor for name, tensor in content.items() if isinstance(name, str) and isinstance(tensor, torch.Tensor) and name not in NUMBERS}
    if not named or len(named) > MOST_WORDS:
        raise UserError(f"{path} has {len(named)} tensors by name; expected one, named after the learned word")
    if tokens and all(isinstance(token, str) for token in tokens) and len(named) == 1 and next(iter(named)) in NAMELESS:
        tensor, = named.values()
        rows = tensor[None] if tensor.ndim == 1 else tensor
        if len(tokens) > 1 and len(rows) != len(tokens):
            raise UserError(f"{path} has {len(tokens)} tokens and {len(rows)} embeddings; expected as many")
        return dict(zip(tokens, rows)) if len(tokens) > 1 else {tokens[0]: rows}
    return named


def letters(word):
    return re.sub(r'[<>:"/\\|?*\s]', "", word).lower()


def meant(word, path, needed):
    """Which of the words `needed` a file is of, that tells this one ("" for none): that one, or one of the same letters, or the one in the file's name."""
    if word in needed:
        return word
    parts = {part.lower() for part in re.split(r"[^A-Za-z0-9]+", path.stem) if part} | {letters(path.stem)}
    for names in ([{letters(word)}] if word else []) + ([parts] if not word or word == path.stem else []):
        fits = [other for other in needed if letters(other) in names]
        if len(fits) == 1:
            return fits[0]
    return word


def given(source, needed):
    """[(path, word or None, initial word or None)] of --embeddings: a folder or file, or `<new1>=FILE`, or `<new1>=dog+FILE` for a difference to dog's row."""
    text = str(source)
    for word in needed:
        if text.startswith(f"{word}=") and not os.path.exists(text):
            initial, plus, file = text[len(word) + 1:].partition("+")
            if plus and not os.path.exists(text[len(word) + 1:]):
                return [(existing_file(file, "embedding"), word, initial)]
            return [(existing_file(text[len(word) + 1:], "embedding"), word, None)]
    if "=" in text and not os.path.exists(text):
        raise UserError(f"--embeddings {text} names no word of the prompts; expected one of {', '.join(needed) or 'those of INPUT_JSON'}, as in '<new1>=FILE'")
    return [(path, None, None) for path in word_files(source)]


def foreign(path, word, rows, width):
    """Why a file's vectors [n, dim] cannot be a word of this model's, whose vectors have `width` numbers (0: any); "" where they can."""
    if width and rows.shape[1] != width:
        other = f", {OTHERS[rows.shape[1]]}" if rows.shape[1] in OTHERS else ""
        return (f"{path} was learned with another model{other}: its vectors have {rows.shape[1]} numbers, this model's words have {width} dimensions")
    second = path.with_name(f"{path.stem}_2{path.suffix}")  # where diffusers' training of Stable Diffusion XL writes the other half
    if width == 768 and os.path.isfile(second):
        with suppress(UserError):
            half = read_words(second)[0].get(word)
            if half is not None and half.shape[1] == 1280:
                return f"{path} was learned with another model, Stable Diffusion XL: 768 of its numbers are here, 1,280 in {second.name}"
    return ""


def gather(sources, needed, texts=(), width=0, model="", learn=lambda words: "scripts/p3_train.sh", tell_others=True):
    """({word: rows}, {word: the word whose row they are added to}, {word: (path, metadata)}) of sources: the words `needed`, and others that `texts` have.

    What is not needed, cannot be read or is of vectors of another width is left out with a note; a `UserError` where a word that is needed is then missing, or
    told twice. width: of the model's words, 0 if any will do. model: its name (embedding.model_name), whose words come before others. learn: gives the
    command that learns words. tell_others: whether a note tells of words that are not needed."""
    found, initials, origin, refused, others, wrong = {}, {}, {}, [], [], {}
    entries = [entry for source in sources for entry in given(source, needed)]
    where = ", ".join(map(str, sources))
    if not entries:
        raise UserError(f"{where} has no embeddings; expected files of words, as scripts/p3_train.sh writes them")
    for path, named, initial in entries:
        try:
            words, differences, metadata = read_entry(path, named, initial)
        except UserError as error:
            if named or len(entries) == 1 or (path in map(Path, sources) and not isinstance(error, ForeignWord)):  # it was asked for
                raise
            refused.append(str(error))
            continue
        for told, rows in words.items():
            word = named or (needed[0] if not told and len(entries) == len(needed) == len(words) == 1 else meant(told, path, needed))
            if needed and word not in needed and not (word and not word.isalpha() and any(word in text for text in texts)):
                others.append(f"{word or 'a nameless one'} ({path.name})")
                continue
            word = word or letters(path.stem)
            reason = foreign(path, told, rows, width)
            if reason:
                if named or len(entries) == 1:
                    raise ForeignWord(reason)
                wrong[word] = reason
                refused.append(reason)
                continue
            if word in found and not found[word].equal(rows):
                kept, left = pick((origin[word][0], origin[word][1].get("model")), (path, metadata.get("model")), model)
                if kept is None:
                    raise UserError(f"{path}: the word {word} is in two files, also in {origin[word][0]}; expected one, or '{word}=FILE'")
                note(f"{left} is left out: {kept} has {word} too, of this model or in its last state")
                if kept != path:
                    continue
            found[word], origin[word] = rows, (path, metadata)
            if told in differences:
                initials[word] = differences[told]
    for line in refused:
        note(f"left out: {line}")
    if others and tell_others:
        note(f"left out, as no prompt has them: {', '.join(others[:5])}{f' and {len(others) - 5} more' if len(others) > 5 else ''}")
    missing = [word for word in needed if word not in found]
    if missing:
        reason = next((wrong[word] for word in missing if word in wrong), refused[0] if refused else "")
        raise UserError(f"{where} has no embedding of {', '.join(missing)} (only {', '.join([*found, *others]) or 'what cannot be read'}); learn "
                        f"{'it' if len(missing) == 1 else 'them'} with {learn(missing)}, or give '{missing[0]}=FILE'" + (f" ({reason})" if reason else ""))
    return found, initials, origin


def read_entry(path, named, initial):
    """What `read_words` gives of a file; of a file that was given for a word, that one, under that name."""
    words, differences, metadata = read_words(path)
    if named and len(words) > 1 and named not in words:
        raise UserError(f"{path} has {len(words)} words ({', '.join(words)}); expected that of {named}")
    if named:
        told = named if named in words else next(iter(words))
        words, differences = {named: words[told]}, {named: initial or differences[told]} if initial or told in differences else {}
    return words, differences, metadata


def pick(a, b, model):
    """(kept, left) of two files (path, name of its model) of one word: the one of this model, or the last state, as diffusers' training writes
    learned_embeds-steps-500 and its kin beside learned_embeds. (None, None) where nothing tells them apart."""
    if model and (a[1] == model) != (b[1] == model):
        return (a[0], b[0]) if a[1] == model else (b[0], a[0])
    steps = [int(match[1]) if (match := re.search(r"-steps?-(\d+)", path.stem)) else float("inf") for path, _ in (a, b)]
    if steps[0] == steps[1]:
        return None, None
    return (a[0], b[0]) if steps[0] > steps[1] else (b[0], a[0])
