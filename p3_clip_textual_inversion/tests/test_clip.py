"""CLIPs as people have them: OpenAI's TorchScript, open_clip's and Hugging Face's folders and files, SigLIP's scores. Each gives the features of its origin."""

import json
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

from p3_clip_textual_inversion.clip import Attention, Grader, compute_in, image_features, load_clip, make_clip_tokenizer, read_merges
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats import open_clip_folder
from p3_clip_textual_inversion.formats.checkpoint import read_torchscript

SHAPE = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
         "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}}
PICTURES, TEXTS = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, ["a photo of a dog", "two houses"]


def make_clip(quick):
    torch.manual_seed(0)
    clip = open_clip.CLIP(**SHAPE, quick_gelu=quick).eval()
    for parameter in clip.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return clip


def features_of(clip, tokens):
    with torch.inference_mode():
        return torch.cat([clip.encode_image(PICTURES, normalize=True), clip.encode_text(tokens, normalize=True)])


def save_torchscript(clip, path):
    """As OpenAI's files are: traced, in half precision, with three numbers beside the weights."""
    expected = features_of(clip.half().float(), open_clip.tokenize(TEXTS))
    for name in ("input_resolution", "vocab_size"):
        clip.register_buffer(name, torch.tensor(1)) if not hasattr(clip, name) else None
    traced = torch.jit.trace_module(clip, {"encode_image": (PICTURES,), "encode_text": (open_clip.tokenize(TEXTS),)}, check_trace=False)
    torch.jit.save(traced.half(), path)
    return expected


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("quick", [True, False])
def test_openais_torchscript_is_read_and_not_run(tmp_path, monkeypatch, quick):
    expected = save_torchscript(make_clip(quick), tmp_path / "ViT-B-32.pt")
    for name in ("load", "script", "trace"):
        monkeypatch.setattr(torch.jit, name, lambda *_, **__: pytest.fail("code of the file was run"))
    clip, transform, tokenizer = load_clip(tmp_path / "ViT-B-32.pt")
    assert torch.allclose(features_of(clip, tokenizer(TEXTS)), expected, atol=1e-5)
    assert isinstance(clip.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU) == quick
    assert "mean=(0.48145466," in str(transform) and "size=32" in str(transform)


@pytest.fixture
def names(monkeypatch):
    """The shape above as models of open_clip: tiny and tiny-quickgelu; and wide, another shape."""
    for name, change in (("tiny", {}), ("tiny-quickgelu", {"quick_gelu": True}), ("wide", {"embed_dim": 32})):
        monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, {**SHAPE, **change})


@pytest.mark.filterwarnings("ignore")
def test_a_name_does_not_overrule_what_the_file_tells(tmp_path, names):
    expected = save_torchscript(make_clip(True), tmp_path / "quick.pt")
    for name in ("tiny", "tiny-quickgelu"):
        clip, _, tokenizer = load_clip(name, tmp_path / "quick.pt")
        assert torch.allclose(features_of(clip, tokenizer(TEXTS)), expected, atol=1e-5), name
    save_torchscript(make_clip(False), tmp_path / "plain.pt")
    with pytest.raises(UserError, match=r"tiny-quickgelu has QuickGELU, but the weights in .*plain\.pt were trained with GELU; use tiny"):
        load_clip("tiny-quickgelu", tmp_path / "plain.pt")


def test_openais_weights_saved_again_are_known_by_what_stands_beside_them(tmp_path):
    clip = make_clip(True)
    marks = dict.fromkeys(("input_resolution", "context_length", "vocab_size"), torch.tensor(1))
    torch.save(clip.half().state_dict() | marks, tmp_path / "openai.pt")
    loaded, _, tokenizer = load_clip(tmp_path / "openai.pt")
    assert torch.allclose(features_of(loaded, tokenizer(TEXTS)), features_of(clip.float(), open_clip.tokenize(TEXTS)), atol=1e-5)


@pytest.mark.parametrize("quick", [True, False])
def test_a_state_dict_is_what_its_name_says(tmp_path, names, quick):
    clip = make_clip(quick)
    torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in clip.state_dict().items()}}, tmp_path / "epoch_1.pt")
    loaded, _, tokenizer = load_clip("tiny-quickgelu" if quick else "tiny", tmp_path / "epoch_1.pt")
    assert torch.allclose(features_of(loaded, tokenizer(TEXTS)), features_of(clip, open_clip.tokenize(TEXTS)), atol=1e-5)
    with pytest.raises(UserError, match="does not tell whether it was trained with QuickGELU: give the model"):
        load_clip(tmp_path / "epoch_1.pt")
    with pytest.raises(UserError, match=r"epoch_1\.pt does not fit the network: .* is \(64, 16\), expected \(64, 32\)") as error:
        load_clip("wide", tmp_path / "epoch_1.pt")
    assert "\n" not in str(error.value)


@pytest.fixture
def hugging_face(tmp_path):
    """(a CLIPModel with QuickGELU, the folder that it was saved to)"""
    torch.manual_seed(0)
    tower = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 1, "hidden_act": "quick_gelu", "projection_dim": 16}
    model = CLIPModel(CLIPConfig(projection_dim=16, vision_config=tower | {"image_size": 32, "patch_size": 16}, text_config=tower)).eval()
    model.save_pretrained(tmp_path / "hf")
    return model, tmp_path / "hf"


def test_a_hugging_face_folder_or_file(hugging_face, tmp_path, names):
    model, folder = hugging_face
    shutil.copyfile(folder / "model.safetensors", tmp_path / "alone.safetensors")
    ids = open_clip.tokenize(TEXTS)
    with torch.inference_mode():
        output = model(input_ids=ids, pixel_values=PICTURES)
    expected = torch.cat([output.image_embeds, output.text_embeds])
    for source in ((folder,), (folder / "model.safetensors",), ("tiny-quickgelu", tmp_path / "alone.safetensors")):
        clip, transform, tokenizer = load_clip(*source)
        assert torch.allclose(features_of(clip, tokenizer(TEXTS)), expected, atol=1e-5), source
        assert "size=32" in str(transform)
    gelu = load_clip("tiny", tmp_path / "alone.safetensors")[0]
    assert not torch.allclose(features_of(gelu, ids), expected, atol=1e-3)
    (folder / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"config\.json is not of a CLIP or SigLIP: its model_type is 'bert'"):
        load_clip(folder)


def test_siglip_scores_each_caption_by_itself(tmp_path, tiny_clip):
    torch.manual_seed(0)
    tokenizer = make_clip_tokenizer(read_merges(tiny_clip / "bpe.txt.gz"), 24)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = SiglipModel(SiglipConfig(vision_config=tower | {"image_size": 32, "patch_size": 16},
                                     text_config=tower | {"vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 32})).eval()
    model.logit_scale.data.fill_(1.5), model.logit_bias.data.fill_(-2)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    grader = Grader(tmp_path)
    ids = tokenizer(TEXTS, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.inference_mode():
        expected = model(input_ids=ids, pixel_values=PICTURES).logits_per_image
    scale, bias = grader.logits
    cosines = image_features(grader.clip, [PICTURES], torch.device("cpu"), torch.float32) @ grader.of_texts(TEXTS).T
    assert torch.allclose(scale * cosines + bias, expected, atol=1e-5)
    assert "ratio" not in str(grader.transform) and "mean=(0.5, 0.5, 0.5)" in str(grader.transform)


def test_half_precision_is_that_of_the_products_only(tiny_clip):
    """The attention of few products gives torch's features in float32; in bf16 norms and sums stay, and the weights have the same names."""
    whole, half = load_clip(tiny_clip)[0], load_clip(tiny_clip)[0]
    pictures = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for module in half.modules():
        if type(module) is torch.nn.MultiheadAttention:
            module.__class__ = Attention
    cpu = torch.device("cpu")
    expected = image_features(whole, [pictures], cpu, torch.float32)
    assert torch.allclose(image_features(half, [pictures], cpu, torch.float32), expected, atol=1e-5)
    tokens = open_clip.tokenize(["a", "b"])[:, :24].clamp(max=500)
    assert torch.allclose(half.encode_text(tokens), whole.encode_text(tokens), atol=1e-4)  # its mask is obeyed
    compute_in(half, torch.bfloat16)
    assert half.state_dict().keys() == whole.state_dict().keys()
    block = half.visual.transformer.resblocks[0]
    assert block.attn.in_proj_weight.dtype == block.mlp.c_fc.weight.dtype == torch.bfloat16 and block.ln_1.weight.dtype == torch.float32
    rough = image_features(half, [pictures], cpu, torch.bfloat16)
    assert rough.dtype == torch.float32 and 1e-6 < 1 - (rough * expected).sum(1).min() < 1e-3


def test_hugging_faces_tower_in_half_precision(hugging_face):
    _, folder = hugging_face
    whole, half = Grader(folder), Grader(folder, dtype=torch.bfloat16)
    pictures = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    assert ((whole.of_pictures(pictures) * half.of_pictures(pictures)).sum(1) > 0.999).all()
    assert torch.equal(whole.of_texts(TEXTS), half.of_texts(TEXTS))


def folder_with(tiny_clip, folder, name="open_clip_config.json", **change):
    """A copy of a CLIP's folder whose configuration is changed: part__key=value."""
    if folder != tiny_clip:
        shutil.copytree(tiny_clip, folder)
    config = json.loads((folder / name).read_text())
    for key, value in change.items():
        *parts, last = key.split("__")
        place = config
        for part in parts:
            place = place[part]
        place[last] = value
    (folder / name).write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("change, said", [
    ({"model_cfg__text_cfg__tokenizer_kwargs": {"trust_remote_code": True}}, "tokenizer_kwargs may have clean, strip_sep_token only"),
    ({"model_cfg__text_cfg__hf_model_name": "someone/bert"}, "text_cfg has 'hf_model_name', which is not obeyed here"),
    ({"model_cfg__vision_cfg__timm_model_name": "hf-hub:someone/vit"}, "timm_model_name 'hf-hub:someone/vit' is no model of timm's"),
    ({"model_cfg__vision_cfg__timm_model_pretrained": True}, "timm_model_pretrained asks for other weights"),
    ({"model_cfg__text_cfg__vocab_size": 10**9}, "vocab_size is 1000000000; expected a whole number from 1, at most 1,000,000"),
    ({"model_cfg__text_cfg__width": 19_998}, "does not fit the network"),  # not built before it is compared
    ({"model_cfg__vision_cfg__layers": "12"}, "layers is 12; expected a whole number"), ({"model_cfg__vision_cfg__width": True}, "width is True"),
    ({"model_cfg__embed_dim": -1}, "embed_dim is -1"), ({"model_cfg__vision_cfg__mlp_ratio": float("inf")}, "open_clip_config.json"),
    ({"model_cfg__vision_cfg": [1]}, "must have an object vision_cfg"), ({"model_cfg": 3}, "must have an object model_cfg"),
    ({"preprocess_cfg__mean": [0.5]}, "mean must be three numbers"), ({"preprocess_cfg__resize_mode": "random"}, "resize_mode 'random' is not known here"),
])
def test_what_a_configuration_may_say_is_on_a_list(tiny_clip, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr("huggingface_hub.file_download.http_get", lambda *_, **__: pytest.fail("the network was asked"))
    with pytest.raises(UserError, match=re.escape(said)) as error:
        load_clip(folder_with(tiny_clip, tmp_path / "clip", **change))
    assert "\n" not in str(error.value)


def test_published_configurations_are_on_the_list():
    """All of open_clip's own, but for those with a text tower of another library, and CoCa, which is no CLIP."""
    refused = set()
    for path in sorted((Path(open_clip.__file__).parent / "model_configs").glob("*.json")):
        try:
            open_clip_folder.check_config({"model_cfg": json.loads(path.read_text())}, path)
        except UserError as error:
            refused.add(path.stem)
            assert "hf_model_name" in str(error) or "multimodal_cfg" in str(error) or "hf_" in str(error), error
    assert len(refused) < 25 and not {"ViT-B-32", "ViT-L-14", "RN50", "ViT-B-16-SigLIP", "ViT-H-14", "convnext_base_w"} & refused


def test_a_folder_without_weights_is_no_clip(tiny_clip, hugging_face, tmp_path):
    """open_clip and transformers would draw them at random, and warn at most."""
    (folder_with(tiny_clip, tmp_path / "clip") / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has a open_clip_config\.json, but none of open_clip_model\.safetensors"):
        load_clip(tmp_path / "clip")
    _, folder = hugging_face
    state = load_file(folder / "model.safetensors")
    del state["text_model.final_layer_norm.weight"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit the network: missing text_model\.final_layer_norm\.weight"):
        load_clip(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has a config\.json, but none of model\.safetensors"):
        load_clip(folder)


def test_a_tokenizer_with_code_of_its_own_is_not_run(tiny_clip, tmp_path):
    folder = folder_with(tiny_clip, tmp_path / "clip", model_cfg__text_cfg__hf_tokenizer_name="any")
    (folder / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["evil.Tokenizer", null]}}')
    with pytest.raises(UserError, match="asks for code of its own"):
        load_clip(folder)


@pytest.mark.parametrize("change", [{"text_config__hidden_act": "relu"}, {"text_config__vocab_size": "many"}, {"vision_config__hidden_size": 10**9}])
def test_what_hugging_faces_configuration_says_is_checked(hugging_face, change):
    _, folder = hugging_face
    with pytest.raises(UserError, match=r"config\.json: \w+ of \w+ is .* not known here"):
        load_clip(folder_with(folder, folder, "config.json", **change))


class Runs:
    """What a hostile pickle holds: a call."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def archive(path, content, record=b"\0" * 8, compression=zipfile.ZIP_STORED):
    class Pickler(pickle.Pickler):
        def persistent_id(self, what):
            return ("storage", torch.FloatStorage, "0", "cpu", 2) if what == "stored" else None

    with zipfile.ZipFile(path, "w") as file, file.open("a/data.pkl", "w") as inside:
        Pickler(inside, 2).dump(content)
    with zipfile.ZipFile(path, "a", compression) as file:
        file.writestr("a/constants.pkl", b"")
        file.writestr("a/data/0", record)


@pytest.mark.parametrize("content, said", [
    (Runs(exec, "raise SystemExit('run')"), "it asks for __builtin__.exec"),
    (Runs(torch._utils._rebuild_tensor_v2, "stored", 0, (10**6, 10**6), (0, 0), False, {}), "a tensor is larger than what is stored of it"),
    (Runs(torch._utils._rebuild_tensor_v2, "stored", 5, (2,), (1,), False, {}), "out of bounds"),
    ({"a": 1}, "without weights"),
])
def test_a_hostile_archive_is_refused(tmp_path, content, said):
    archive(tmp_path / "a.pt", content)
    with pytest.raises(UserError, match=said) as error:
        read_torchscript(tmp_path / "a.pt")
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"a\.pt"):
        load_clip(tmp_path / "a.pt")


@pytest.mark.parametrize("record, compression", [(b"\0" * 4, zipfile.ZIP_STORED), (b"\0" * 8, zipfile.ZIP_DEFLATED)])
def test_records_that_are_not_what_they_say_are_refused(tmp_path, record, compression):
    archive(tmp_path / "a.pt", Runs(torch._utils._rebuild_tensor_v2, "stored", 0, (2,), (1,), False, {}), record, compression)
    with pytest.raises(UserError, match="has not the size of 2 numbers"):
        read_torchscript(tmp_path / "a.pt")


def test_weights_that_are_not_finite_get_no_grade(tiny_clip, tmp_path):
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    state = load_file(folder / "open_clip_model.safetensors")
    state["visual.proj"][0, 0] = torch.nan
    save_file(state, folder / "open_clip_model.safetensors")
    with pytest.raises(UserError, match=r"holds values in visual\.proj that are not finite"):
        load_clip(folder)
