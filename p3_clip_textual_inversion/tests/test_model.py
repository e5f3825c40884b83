"""The model: Stable Diffusion loaded from a folder, from one file in the original layout, and from files that are wrong or hostile."""

import os
import pickle
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from p3_clip_textual_inversion.experiments.fullsize import original_layout, write_checkpoint
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.checkpoint import read_checkpoint
from p3_clip_textual_inversion.model import CONFIGS, load_single_file, load_stable_diffusion


@pytest.fixture(scope="module")
def parts(tiny_sd):
    return load_stable_diffusion(tiny_sd)


@pytest.fixture(scope="module")
def layout(parts):
    return original_layout(parts.unet, parts.vae, parts.text_encoder, torch.float32)


def same_output(a, b):
    x, t, ids = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500]), torch.arange(24)[None]
    with torch.inference_mode():
        hidden = a.text_encoder(ids).last_hidden_state
        assert torch.allclose(hidden, b.text_encoder(ids).last_hidden_state, atol=1e-5)
        assert torch.allclose(a.unet(x, t, hidden).sample, b.unet(x, t, hidden).sample, atol=1e-5)
        assert torch.allclose(a.decode(x), b.decode(x), atol=1e-5)
        picture = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.allclose(a.vae.encode(picture).latent_dist.mean, b.vae.encode(picture).latent_dist.mean, atol=1e-5)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_single_file_gives_the_same_model(parts, layout, tiny_sd, tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    if suffix == ".ckpt":
        write_checkpoint(path, layout)
        with pytest.raises(pickle.UnpicklingError):  # as the real one: torch alone refuses it
            torch.load(path, weights_only=True)
    else:
        save_file({name: tensor.contiguous() for name, tensor in layout.items()}, path)
    same_output(parts, load_single_file(path, configs=tiny_sd))


def test_names_of_the_original_layout(layout):
    """Some of the names of the published file, and how many it has for the UNet."""
    for name in ("model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight", "model.diffusion_model.input_blocks.3.0.op.weight",
                 "model.diffusion_model.output_blocks.2.1.conv.weight", "model.diffusion_model.output_blocks.5.2.conv.bias",
                 "model.diffusion_model.middle_block.0.emb_layers.1.weight", "model.diffusion_model.out.2.bias",
                 "first_stage_model.decoder.up.3.block.0.conv1.weight", "first_stage_model.encoder.mid.attn_1.q.weight",
                 "first_stage_model.encoder.down.2.block.0.nin_shortcut.weight", "first_stage_model.quant_conv.weight"):
        assert name in layout, name
    assert sum(name.startswith("model.diffusion_model.") for name in layout) == 686


def test_shipped_configs_are_those_of_stable_diffusion_v1():
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "unet"))
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / "vae"))
        text = CLIPTextModel(CLIPTextConfig.from_pretrained(CONFIGS / "text_encoder"))
    counts = [sum(p.numel() for p in model.parameters()) for model in (unet, vae, text)]
    assert counts == [859_520_964, 83_653_863, 123_060_480]  # the published numbers
    assert (len(unet.state_dict()), len(vae.state_dict())) == (686, 248)


def test_missing_and_wrong_keys_are_named(layout, tiny_sd, tmp_path):
    for key, changed in (("model.diffusion_model.input_blocks.1.0.in_layers.2.weight", None), ("first_stage_model.decoder.conv_in.bias", None),
                         ("cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight", None),
                         ("cond_stage_model.transformer.text_model.embeddings.token_embedding.weight", torch.zeros(7, 32))):
        wrong = {name: tensor for name, tensor in layout.items() if name != key} | ({} if changed is None else {key: changed})
        save_file({name: tensor.contiguous() for name, tensor in wrong.items()}, tmp_path / "wrong.safetensors")
        with pytest.raises(UserError, match=r"wrong\.safetensors"):
            load_single_file(tmp_path / "wrong.safetensors", configs=tiny_sd)


BAD_WEIGHTS = {"int8": lambda tensor: tensor.to(torch.int8), "bool": torch.Tensor.bool, "complex64": lambda tensor: tensor.to(torch.complex64),
               "float8_e4m3fn": lambda tensor: tensor.to(torch.float8_e4m3fn), "not finite": lambda tensor: torch.full_like(tensor, float("nan")),
               "infinite": lambda tensor: torch.full_like(tensor, float("-inf"))}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("name", ["model.diffusion_model.out.2.weight", "first_stage_model.decoder.conv_in.weight",
                                  "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"])
def test_a_file_of_weights_that_are_no_numbers_is_refused(layout, tiny_sd, tmp_path, name, kind):
    save_file({n: (BAD_WEIGHTS[kind](tensor) if n == name else tensor).contiguous() for n, tensor in layout.items()}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=rf"a\.safetensors holds .*{name}") as error:
        load_single_file(tmp_path / "a.safetensors", configs=tiny_sd)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin"])
def test_a_folder_of_weights_that_are_no_numbers_is_refused(tiny_sd, tmp_path, file, kind):
    shutil.copytree(tiny_sd, tmp_path / "sd")
    path = next((tmp_path / "sd" / file).parent.glob("*.safetensors"))
    weights = load_file(path)
    name = next(name for name, tensor in weights.items() if tensor.ndim == 2)
    weights[name] = BAD_WEIGHTS[kind](weights[name])
    path.unlink()
    (save_file if file.endswith(".safetensors") else torch.save)(weights, tmp_path / "sd" / file)
    with pytest.raises(UserError, match=rf"holds .*{name}") as error:
        load_stable_diffusion(tmp_path / "sd")
    assert "\n" not in str(error.value)


def test_a_part_in_half_precision_beside_a_damaged_one_that_is_not_read(tiny_sd, tmp_path):
    """Only what is loaded is checked."""
    shutil.copytree(tiny_sd, tmp_path / "sd")
    save_file({"a": torch.ones(2, 2, dtype=torch.int8)}, tmp_path / "sd" / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    load_stable_diffusion(tmp_path / "sd")


def test_whole_component_missing(layout, tmp_path):
    save_file({name: tensor.contiguous() for name, tensor in layout.items() if "cond_stage" not in name}, tmp_path / "no_text.safetensors")
    with pytest.raises(UserError, match=r"no keys cond_stage_model\.transformer"):
        load_stable_diffusion(tmp_path / "no_text.safetensors")


@pytest.mark.parametrize("count", [2, 101])
def test_averaged_weights_are_told_where_there_are_some(tmp_path, capsys, count):
    """A published file has only their counters left."""
    torch.save({"state_dict": {"a": torch.ones(2)} | {f"model_ema.{i}": torch.tensor(1.0) for i in range(count)}}, tmp_path / "a.ckpt")
    assert len(read_checkpoint(tmp_path / "a.ckpt")) == 1 + count
    assert ("also holds averaged weights" in capsys.readouterr().err) == (count > 100)


class Hostile:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.mark.parametrize("function, refused", [(os.system, True), (eval, False), (exec, False), (shutil.rmtree, False)])
def test_code_in_a_checkpoint_is_not_run(tmp_path, function, refused):
    victim = tmp_path / "victim"
    victim.mkdir()
    argument = {os.system: f"rm -r '{victim}'", shutil.rmtree: str(victim)}.get(function, f"__import__('shutil').rmtree({str(victim)!r})")
    path = tmp_path / "hostile.ckpt"
    torch.save({"state_dict": {"a": torch.ones(2)}, "callbacks": Hostile(function, argument)}, path)
    if refused:
        with pytest.raises(UserError, match=r"hostile\.ckpt cannot be read"):
            read_checkpoint(path)
    else:
        assert list(read_checkpoint(path)) == ["a"]
    assert victim.exists()
    torch.load(path, weights_only=False)  # and it was no dud: a plain load runs it
    assert not victim.exists()


def test_files_that_are_no_checkpoints(tmp_path, layout):
    cases = {"empty.ckpt": b"", "text.ckpt": b"not a checkpoint\n", "text.safetensors": b"nor this", "list.ckpt": None, "cut.ckpt": None}
    for name, content in cases.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    torch.save([1, 2], tmp_path / "list.ckpt")
    write_checkpoint(tmp_path / "whole.ckpt", layout)
    whole = (tmp_path / "whole.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[:len(whole) // 2])
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("a.txt", "b")
    for name in [*cases, "zip.ckpt"]:
        with pytest.raises(UserError) as caught:
            load_stable_diffusion(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)


def test_an_autoencoder_that_overflows_in_half_precision_goes_on_in_float32(tiny_sd, capsys):
    exact, half = load_stable_diffusion(tiny_sd), load_stable_diffusion(tiny_sd)
    half.vae.half()
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert torch.allclose(half.decode(x), exact.decode(x), atol=0.02) and half.vae.dtype == torch.float16 and not capsys.readouterr().err
        assert torch.allclose(half.decode(1e5 * x), exact.decode(1e5 * x), atol=0.02) and half.vae.dtype == torch.float32
    assert "the autoencoder is not finite in fp16" in capsys.readouterr().err


def test_sources_that_are_not_there(tmp_path):
    for source, said in ((tmp_path / "nothing.ckpt", "no such checkpoint"), ("sd-v1-4.ckpt", "no such checkpoint"), (tmp_path, "no model_index.json")):
        with pytest.raises(UserError, match=said):
            load_stable_diffusion(source)


def test_damaged_folder(tiny_sd, tmp_path):
    folder = shutil.copytree(tiny_sd, tmp_path / "sd")
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load Stable Diffusion"):
        load_stable_diffusion(folder)
