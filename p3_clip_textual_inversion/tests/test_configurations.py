"""What a downloaded folder says of itself: sizes that would never be built, settings that are not obeyed, tokenizers that are not there are one line."""

import json
import shutil

import pytest
from transformers import CLIPConfig, CLIPModel

from p3_clip_textual_inversion.clip import load_clip
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.model import load_stable_diffusion

TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
PREPARED = {"crop_size": {"height": 32, "width": 32}, "do_center_crop": True, "do_convert_rgb": True, "do_normalize": True, "do_rescale": True,
            "do_resize": True, "image_mean": [0.48, 0.46, 0.41], "image_std": [0.27, 0.26, 0.28], "resample": 3,
            "rescale_factor": 1 / 255, "size": {"shortest_edge": 32}}


def changed(folder, path, change):
    """The folder, whose JSON file says something else."""
    content = json.loads((folder / path).read_text())
    (folder / path).write_text(json.dumps(content | change))
    return folder


@pytest.mark.parametrize("path, change, said", [
    ("unet/config.json", {"layers_per_block": 10**8}, "layers_per_block is 100000000; expected a text, or numbers of at most 200"),
    ("unet/config.json", {"block_out_channels": [10**5] * 4}, "block_out_channels is"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "'time_cond_proj_dim', 256, which is not obeyed here"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "not obeyed"),
    ("vae/config.json", {"layers_per_block": 10**8}, "layers_per_block is"), ("vae/config.json", {"shift_factor": 0.1}, "'shift_factor', 0.1, which is not"),
    ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "'latents_mean'"), ("text_encoder/config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is"),
    ("text_encoder/config.json", {"quantization_config": {"load_in_8bit": True}}, "'quantization_config'"),
    ("text_encoder/config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "'auto_map'"),
    ("text_encoder/config.json", {"vocab_size": 5000}, "a part's weights are not of the sizes that its config.json tells"),
    ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**9}, "num_train_timesteps 1000000000, expected 1000"),
])
def test_stable_diffusion(tiny_sd, tmp_path, capfd, path, change, said):
    """At once, before it is built, or memory taken for it."""
    with pytest.raises(UserError, match=said) as error:
        load_stable_diffusion(changed(shutil.copytree(tiny_sd, tmp_path / "sd"), path, change))
    assert "\n" not in str(error.value) and "ignore_mismatched_sizes" not in str(error.value)
    assert "MISMATCH" not in capfd.readouterr().err


def test_a_tokenizer_that_is_not_there_or_reads_without_end(tiny_sd, tmp_path):
    """transformers makes one that knows nothing, in silence; and some folders say 10^30 for a length that they do not limit."""
    folder = changed(shutil.copytree(tiny_sd, tmp_path / "sd"), "tokenizer/tokenizer_config.json", {"model_max_length": 10**30})
    assert load_stable_diffusion(folder).tokenizer.model_max_length == 24
    for path in (folder / "tokenizer").iterdir():
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(UserError, match=r"(is not whole: its tokenizer knows|cannot load Stable Diffusion)"):
        load_stable_diffusion(folder)


@pytest.fixture
def clip_folder(tmp_path):
    """A CLIP in Hugging Face's format, untrained, of OpenAI's vocabulary, as large as a stamp."""
    CLIPModel(CLIPConfig(text_config=TOWER | {"max_position_embeddings": 24}, vision_config=TOWER | {"image_size": 32, "patch_size": 8},
                         projection_dim=16)).save_pretrained(tmp_path / "clip")
    (tmp_path / "clip" / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return tmp_path / "clip"


def test_hugging_face(clip_folder):
    load_clip(str(clip_folder))
    for change, said in (({"do_normalize": False}, "do_normalize False, which is not obeyed"), ({"do_rescale": False}, "do_rescale"),
                         ({"rescale_factor": 1.0}, "rescale_factor 1.0"), ({"resample": 0}, "resample 0"), ({"crop_size": 24}, "crop_size 24"),
                         ({"size": {"shortest_edge": 40}}, "size"), ({"image_std": [0, 1, 1]}, "image_std"), ({"image_mean": ["a", 1, 1]}, "image_mean")):
        changed(clip_folder, "preprocessor_config.json", change)
        with pytest.raises(UserError, match=said):
            load_clip(str(clip_folder))
        (clip_folder / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    for change, said in (({"text_config": TOWER | {"num_hidden_layers": 10**6}}, "num_hidden_layers of text_config is 1000000, which is not known"),
                         ({"vision_config": [1]}, "must be objects")):
        whole = (clip_folder / "config.json").read_text()
        changed(clip_folder, "config.json", change)
        with pytest.raises(UserError, match=said):
            load_clip(str(clip_folder))
        (clip_folder / "config.json").write_text(whole)


def test_a_vocabulary_of_its_own_needs_its_files(tmp_path):
    """transformers makes a tokenizer without a vocabulary, for which all captions are alike."""
    text = TOWER | {"vocab_size": 600, "max_position_embeddings": 24, "bos_token_id": 598, "eos_token_id": 599, "pad_token_id": 1}
    CLIPModel(CLIPConfig(text_config=text, vision_config=TOWER | {"image_size": 32, "patch_size": 8}, projection_dim=16)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"a vocabulary of its own \(600 tokens\), but none of tokenizer\.json"):
        load_clip(str(tmp_path))


@pytest.mark.parametrize("change, said", [
    (lambda c: c["preprocess_cfg"].update(std=[0, 1, 1]), "std must be three numbers, none of them 0"),
    (lambda c: c["preprocess_cfg"].update(mean=["a"] * 3), "mean must be three numbers"),
    (lambda c: c["model_cfg"]["text_cfg"].update(act_kwargs={"approximate": "x"}), "approximate of act_kwargs is x; expected none or tanh"),
])
def test_open_clip(tiny_clip, tmp_path, change, said):
    folder = shutil.copytree(tiny_clip, tmp_path / "clip")
    content = json.loads((folder / "open_clip_config.json").read_text())
    change(content)
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said):
        load_clip(str(folder))
