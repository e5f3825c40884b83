import json

import numpy as np
import open_clip
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file

from p3_clip_textual_inversion import objective
from p3_clip_textual_inversion.clip import load_clip, make_clip_tokenizer, read_merges
from p3_clip_textual_inversion.miniature.models import to_text_encoder, write_merges

pytest.register_assert_rewrite("p3_clip_textual_inversion.tests.tools")
from .tools import call, command, one_thread  # noqa: E402, F401

FEW = 16


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """No test reads or writes the user's cache of features."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def few_kept_latents():
    """A validation measures sixteen latents in place of sixty-four, four in each of its four ranges of t."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(objective, "VALIDATED", FEW)
        yield


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory):
    """The folder of an untrained CLIP of the miniature's shape, but smaller."""
    folder = tmp_path_factory.mktemp("clip")
    merges = write_merges(folder / "bpe.txt.gz", ["a photo of a red dog on the hill near a river, a drawing of a cat in the style of a car, two houses"])
    config = {"embed_dim": 16, "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
              "text_cfg": {"context_length": 24, "vocab_size": 512 + merges + 2, "width": 32, "heads": 2, "layers": 2}}
    torch.manual_seed(0)
    clip = open_clip.CLIP(**config)
    for parameter in clip.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)  # so that no norm or bias is trivial
    save_file({name: tensor.contiguous() for name, tensor in clip.state_dict().items()}, folder / "open_clip_model.safetensors")
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    return folder


@pytest.fixture(scope="session")
def tiny_sd(tiny_clip, tmp_path_factory):
    """The diffusers folder of an untrained Stable Diffusion v1 with its shape (four levels, two layers each), but narrow: 64x64 pixels, 8x8 latents."""
    folder = tmp_path_factory.mktemp("sd")
    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=8, block_out_channels=(32, 48, 64, 64), cross_attention_dim=32, attention_head_dim=2, norm_num_groups=8)
    vae = AutoencoderKL(block_out_channels=(16, 16, 32, 32), layers_per_block=2, latent_channels=4, sample_size=64, norm_num_groups=8,
                        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4)
    tokenizer = make_clip_tokenizer(read_merges(tiny_clip / "bpe.txt.gz"), 24)
    encoder = to_text_encoder(load_clip(str(tiny_clip))[0], tokenizer)
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    StableDiffusionPipeline(vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler, safety_checker=None,
                            feature_extractor=None, requires_safety_checker=False).save_pretrained(folder)
    return folder


@pytest.fixture
def concepts_json(tmp_path):
    """An input.json of two concepts, each with three pictures beside it."""
    folder = tmp_path / "concepts"
    rng = np.random.default_rng(0)
    for number in "01":
        (folder / number).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(rng.integers(0, 256, (70, 80, 3), np.uint8)).save(folder / number / f"{i}.png")
    content = {"0": {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1> on a hill", "two <new1>"]},
               "1": {"src_image": "red car", "token_name": "<new2>", "prompt": ["a house in the style of <new2>"]}}
    (folder / "input.json").write_text(json.dumps(content))
    return folder / "input.json"


@pytest.fixture
def echo():
    """A UNet that puts out what its condition says, so that guidance can be computed by hand."""
    class Echo(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.0))

        def forward(self, x, t, hidden):
            class Output:
                sample = x * 0 + hidden.mean(dim=(1, 2))[:, None, None, None] * self.scale
            return Output
    return Echo()
