"""LoRA with pivotal tuning: beside a word, weights of low rank learn, that are added to a frozen model's own and come in a small file of their own.

    W = W0 + (alpha / r) B A,   B [out, r] zeros at first, A [r, in]        (Hu et al. 2022, eq. 3; alpha = r here, so that a file needs no further number)

in the keys and values of every cross-attention, which read the text (Kumari et al. 2023: what changes most). Pivotal tuning (Roich et al. 2021; for words and
low rank Ryu 2022, lora-diffusion) first inverts, then tunes the model around what was found: for a share of the steps the word learns alone, then the weights
learn too. What a word cannot say since the model never saw it, they can.

They leave other prompts alone twice. They are put into the model only where a prompt has their word, before drawing, so that a picture takes no longer. And,
for programs that have them always, A is kept free of what ordinary prompts say (training in the null space of features, Wang et al. 2021):

    A <- A (I - U U'),   U the leading eigenvectors of C' C that hold the share `hold` of its trace, C [N, in] hidden states of ordinary captions

so that W c is all but W0 c for any such c. Several that learned apart are summed: each hears little but its own word.

Files: {word}_lora.safetensors beside the word's own is in diffusers' format (`pipeline.load_lora_weights`); kohya's, which web UIs read, lies in the run's
folder. Both and their older kin are read, from anyone, for attention, feed-forward layers and convolutions of UNet and text encoder.
"""

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch

from .files import UserError, existing_file, first_line, note, parse_json, shown
from .tensors import check_numbers, is_plain, read_safetensors, read_tensors, save_tensors, what_is

ENDING = "_lora.safetensors"
TARGETS = ("attn2.to_k", "attn2.to_v")
WORDS = 400  # of the vocabulary, in captions that stand for all ordinary ones
PART = re.compile(r"(.+?)[._]lora(?:_linear_layer)?[._](A|B|down|up)(?:\.default)?\.weight")  # of peft, kohya, diffusers and its older versions
OTHERS = {"hada_w1": "LoHa", "lokr_w": "LoKr", "dora_scale": "DoRA", "lora_magnitude_vector": "DoRA", "lora_mid": "LoCon by Tucker's decomposition",
          "oft_": "OFT", "on_input": "IA3"}
WIDTHS = {768: "Stable Diffusion v1", 1024: "Stable Diffusion 2", 2048: "Stable Diffusion XL"}  # by the numbers of a token that cross-attention reads


class Factors(NamedTuple):
    """up: B [out, r] or [out, r, 1, 1]; down: A [r, in] or [r, in, k, k]; scale: alpha / r."""
    up: torch.Tensor
    down: torch.Tensor
    scale: float

    def product(self):
        """What is added to the weight, float32 [out, in k k]."""
        return self.scale * self.up.float().flatten(1) @ self.down.float().flatten(1)


def add_lora(unet, rank, seed):
    """Adds weights of low rank to a frozen UNet, by peft. Returns {name: Parameter float32}: A and B by the name of their layer, as they are saved."""
    from peft import LoraConfig  # only a training needs it

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), init_lora_weights="gaussian"))
    added = {name.replace(".default.", "."): parameter for name, parameter in unet.named_parameters() if ".lora_" in name}
    for parameter in added.values():
        parameter.data = parameter.data.float()  # as whatever an optimiser changes; autocast still computes in the model's format
    return added


def ordinary_captions(tokenizer, templates, count=WORDS):
    """Captions of words spread over the tokenizer's vocabulary, whatever the model: one after another in each template, and two beside each other."""
    own = sorted((number, token.removesuffix("</w>")) for token, number in tokenizer.get_vocab().items() if number < tokenizer.vocab_size and "</w>" in token)
    words = [word for _, word in own if len(word) > 2 and word.isascii() and word.isalpha()]
    words = words[::max(len(words) // count, 1)]
    return [template.format(word) for template in templates[-2:] for word in words] + [f"a {a} next to a {b}" for a, b in pairwise(words)]


@torch.no_grad()
def free_directions(parts, templates, hold):
    """The projector float32 [dim, dim] onto what hidden states of ordinary captions do not use: without the directions that have the share `hold` of their
    energy. None where `hold` is 0."""
    if not hold:
        return None
    captions, energy = ordinary_captions(parts.tokenizer, templates), 0
    for i in range(0, len(captions), 64):
        hidden = parts.encode_text(captions[i:i + 64]).flatten(0, 1).cpu().double()
        energy = energy + hidden.T @ hidden
    values, vectors = torch.linalg.eigh(energy)  # ascending
    used = int((values.flip(0).cumsum(0) < hold * values.sum()).sum()) + 1
    free = vectors[:, :max(len(values) - used, 1)]
    return (free @ free.T).float().to(parts.device)


@torch.no_grad()
def keep_free(weights, free):
    """Takes out of each A of `add_lora` what it hears of ordinary prompts. free: of `free_directions`"""
    for name, tensor in weights.items() if free is not None else ():
        if ".lora_A." in name:
            tensor.copy_(tensor @ free)


def lora_file(path):
    """Where the weights of a word lie whose file is `path`."""
    return Path(path).with_name(Path(path).stem + ENDING)


def is_lora(names):
    """Whether the names of a file's tensors are those of weights of low rank, of any kind."""
    return any(isinstance(name, str) and (PART.fullmatch(name) or any(f".{part}" in name for part in OTHERS)) for name in names)


def save_lora(path, weights, metadata):
    """Writes what `add_lora` gave in diffusers' format. metadata: {str: str}"""
    save_tensors(path, {f"unet.{name}": tensor for name, tensor in weights.items()}, metadata)


def save_kohya(path, weights, metadata):
    """The same in the format of kohya's sd-scripts: other names, and alpha beside each pair."""
    tensors, rank = {}, 0
    for name, tensor in weights.items():
        layer, which = PART.fullmatch(name).groups()
        layer = f"lora_unet_{layer.replace('.', '_')}"
        tensors[f"{layer}.lora_{'down' if which == 'A' else 'up'}.weight"] = tensor
        if which == "A":
            rank = len(tensor)
            tensors[f"{layer}.alpha"] = torch.tensor(float(rank))
    save_tensors(path, tensors, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank), **metadata})


def read_lora(path):
    """({name of a layer, as the file has it: `Factors`}, metadata) of a file, checked in itself."""
    path = existing_file(path, "LoRA")
    if what_is(path)[0] == "safetensors":
        content, metadata = read_safetensors(path)
    else:
        content, metadata = read_tensors(path, "LoRA", "weights of low rank, as scripts/p3_train.sh --lora, diffusers or kohya write them", foreign=True), {}
    content = content["state_dict"] if isinstance(content, dict) and isinstance(content.get("state_dict"), dict) else content
    if not isinstance(content, dict) or not is_lora(content):
        raise UserError(f"{path} is no LoRA: it has no pairs lora_A and lora_B, or lora_down and lora_up")
    pairs, alphas = {}, {}
    for name, tensor in content.items():
        kind = next((kind for part, kind in OTHERS.items() if f".{part}" in str(name)), None)
        if kind:
            raise UserError(f"{path} has {shown(name)}, of {kind}, which is not read here; expected plain LoRA, pairs of two matrices")
        match = PART.fullmatch(str(name))
        if match:
            check_numbers(shown(name), tensor, path)
            pairs.setdefault(match[1], {})["down" if match[2] in ("A", "down") else "up"] = tensor
        elif str(name).endswith(".alpha"):
            alphas[str(name).removesuffix(".alpha")] = tensor
        elif not str(name).startswith("bundle_emb."):  # words that some programs put into the same file
            raise UserError(f"{path} also has {shown(name)}; expected pairs of two matrices and their alpha only")
    told = told_alphas(path, metadata)
    return {layer: factors_of(path, layer, pair, alphas.get(layer), told) for layer, pair in pairs.items()}, metadata


def told_alphas(path, metadata):
    """{"unet" or "text_encoder": alpha / r} that the header of a file by diffusers tells, where that is not 1."""
    try:
        told, scales = parse_json(metadata.get("lora_adapter_metadata", "{}")), {}
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} has a damaged lora_adapter_metadata in its header ({first_line(error)})") from None
    for part in ("unet", "text_encoder") if isinstance(told, dict) else ():
        for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern", "lora_bias"):
            if told.get(f"{part}.{key}"):
                raise UserError(f"{path} has {key} {shown(told[f'{part}.{key}'])[:60]}, which is not obeyed here; expected plain LoRA")
        alpha, rank = told.get(f"{part}.lora_alpha"), told.get(f"{part}.r")
        if all(isinstance(value, (int, float)) and 0 < value < math.inf for value in (alpha, rank)):
            scales[part] = alpha / rank
    return scales


def factors_of(path, layer, pair, alpha, told):
    """`Factors` of a layer's tensors, checked."""
    if pair.keys() != {"down", "up"}:
        raise UserError(f"{path} has only {next(iter(pair))} of {shown(layer)}; expected both")
    up, down = pair["up"], pair["down"]
    if up.ndim not in (2, 4) or down.ndim != up.ndim or up.shape[1] != down.shape[0] or 0 in (*up.shape, *down.shape) or math.prod(up.shape[2:]) != 1:
        raise UserError(f"{path} has for {shown(layer)} the shapes {tuple(up.shape)} and {tuple(down.shape)}; expected [out, rank] and [rank, in]")
    if alpha is not None:
        if not is_plain(alpha) or alpha.numel() != 1 or alpha.is_complex() or not math.isfinite(float(alpha)):
            raise UserError(f"{path} has no number as alpha of {shown(layer)}")
        return Factors(up, down, float(alpha) / len(down))
    return Factors(up, down, told.get("text_encoder" if layer.startswith("text_encoder") else "unet", 1.0))


def layers_of(parts):
    """{name, flat, as kohya's files have it: module} of all layers of UNet and text encoder that weights can be added to."""
    found = {}
    for prefix, net in (("unet", parts.unet), ("te", parts.text_encoder)):
        for name, module in net.named_modules():
            if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
                found[f"{prefix}_{name.replace('.', '_')}"] = module
                if prefix == "te" and not name.startswith("text_model"):  # transformers 5 dropped the prefix
                    found[f"te_text_model_{name.replace('.', '_')}"] = module
    return found


def flat_name(layer):
    """The name of a layer in any format, as `layers_of` has it."""
    flat = layer.removeprefix("base_model.model.").replace("processor.", "").replace(".", "_").removeprefix("lora_")
    flat = re.sub(r"^(text_encoder|te1)_", "te_", flat)
    flat = flat if flat.startswith(("unet_", "te_", "te2_", "text_encoder_2_", "transformer_")) else f"unet_{flat}"
    return f"{flat}_0" if flat.endswith("_to_out") else flat


def fit(path, weights, parts):
    """{module: `Factors`} of what `read_lora` gave, for this model; a `UserError` that tells which model they were made for, if another."""
    own, width = layers_of(parts), parts.unet.config.cross_attention_dim
    flat = {flat_name(layer): (layer, factors) for layer, factors in weights.items()}
    if len(flat) < len(weights):
        raise UserError(f"{path} has the weights of a layer twice, under two names; expected once")
    theirs = {factors.down.shape[1] for name, (_, factors) in flat.items() if name.endswith(("attn2_to_k", "attn2_to_v"))}
    if len(theirs) == 1 and theirs != {width}:
        other, = theirs
        raise UserError(f"{path} was made for another model{f', {WIDTHS[other]}' if other in WIDTHS else ''}: its cross-attention reads {other:,} numbers a "
                        f"token, this model's {width:,}")
    if any(name.startswith(("te2_", "text_encoder_2_")) for name in flat):
        raise UserError(f"{path} was made for another model, {WIDTHS[2048]}; expected one for {WIDTHS[768]}")
    unknown = [layer for name, (layer, _) in flat.items() if name not in own]
    if unknown:
        raise UserError(f"{path} was made for another model: it has weights for {shown(unknown[0])}{f' and {len(unknown) - 1} more' if unknown[1:] else ''}, "
                        "which this model has not")
    for name, (layer, factors) in flat.items():
        shape, expected = (factors.up.shape[0], *factors.down.shape[1:]), tuple(own[name].weight.shape)
        if shape[:2] != expected[:2] or math.prod(shape) != math.prod(expected):  # a convolution of one pixel may be a matrix in a file
            raise UserError(f"{path} was made for another model: {shown(layer)} is for {shape}, this model has {expected}")
    return {own[name]: factors for name, (_, factors) in flat.items()}


class Added:
    """A model whose own weights are known (kept in the CPU's memory), with sets of low-rank ones to put into it.

    sets: {name: {module: `Factors`}} of `fit`; scale: by which all are multiplied."""

    def __init__(self, sets, scale=1.0):
        self.sets, self.scale = sets, scale
        self.own = {module: module.weight.detach().to("cpu", copy=True) for factors in sets.values() for module in factors}

    @torch.no_grad()
    def use(self, names):
        """The model's own weights, and those of the sets `names` added."""
        for module, weight in self.own.items():
            here = [self.sets[name][module].product() for name in names if module in self.sets[name]]
            module.weight.copy_((weight.float() + self.scale * sum(here).view_as(weight)) if here else weight)


def find_loras(given, origin):
    """{name: file} of weights to draw with: by the word beside whose file they lie; those that were `given`, which all prompts get, by the file's name.

    origin: {word: (its file, its metadata)}"""
    found = {}
    for word, (path, metadata) in origin.items():
        file, learned_so = lora_file(path), metadata.get("lora", "0") != "0"
        if not file.is_file():
            if learned_so and not given:
                note(f"{word} of {path} learned together with weights of low rank, which should be in {file}: without them it shows less of its concept")
        elif "src_images" in metadata and read_lora(file)[1] != metadata:  # both of this project
            note(f"{file} is left out: it learned in another run than {word} of {path}; give it by --lora if it is meant")
        else:
            found[word] = file
    for path in given:
        if found.setdefault(Path(path).name, Path(path)) != Path(path):
            raise UserError(f"two LoRAs are called {Path(path).name}; rename one of them")
        read_lora(path)  # before long work
    return found


def loras_of(prompt, files, prints):
    """{name: fingerprint} of the weights that a prompt is drawn with: those that were given, and those of its words; what learned together counts once.

    files: of `find_loras`; prints: {name: fingerprint}"""
    here = {prints[name]: name for name in reversed(files) if name in prompt or name == files[name].name}
    return {name: prints[name] for name in files if name in here.values()}


def add_loras(parts, files, scale):
    """`Added` of the files of `find_loras`, checked against the model."""
    return Added({name: fit(path, read_lora(path)[0], parts) for name, path in files.items()}, scale)
