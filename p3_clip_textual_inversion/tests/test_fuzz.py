"""Whatever is in a file that people download or write: it is read, or refused in one line; no other error, no code run."""

import gzip
import io
import json
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from p3_clip_textual_inversion.clip import read_merges
from p3_clip_textual_inversion.concepts import read_concepts
from p3_clip_textual_inversion.data import CAPTIONS, read_captions, read_data
from p3_clip_textual_inversion.embedding import read_embedding
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.checkpoint import read_checkpoint
from p3_clip_textual_inversion.pictures import read_pictures

from .tools import Bomb, answer, damaged, quick

thorough = settings(quick, max_examples=60)

JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=8)
ENTRY = {"src_image": "dog", "token_name": "<new1>", "prompt": ["a <new1>"], "prompt_4_clip_eval": ["a dog"], "baseline": [[1.0, 2]]}


@thorough
@given(key=st.text(max_size=3), changes=st.dictionaries(st.sampled_from([*ENTRY, "other"]), JSON, max_size=2), whole=st.booleans(), anything=JSON)
def test_concepts(tmp_path, key, changes, whole, anything):
    """Any JSON, and entries in which any JSON stands in a field's place."""
    content = {"0": ENTRY, key: ENTRY | changes} if whole else anything
    concepts = answer(read_concepts, tmp_path / "input.json", json.dumps(content).encode("utf-8", "surrogatepass"))
    for concept in concepts or ():
        assert all(concept.token in prompt for prompt in concept.prompts) and len(concept.eval_prompts) == len(concept.prompts)


@thorough
@given(data=st.data())
def test_concepts_damaged(tmp_path, data):
    answer(read_concepts, tmp_path / "input.json", data.draw(damaged(json.dumps({"0": ENTRY}).encode())))


@thorough
@given(lines=st.lists(JSON | st.fixed_dictionaries({"file_name": st.just("a.png") | JSON, "text": st.just("a <new1>") | JSON}), max_size=3))
def test_captions(tmp_path, lines):
    content = "\n".join(json.dumps(line) for line in lines).encode("utf-8", "surrogatepass")
    captions = answer(lambda path: read_captions(path.parent, ["a.png"], "<new1>"), tmp_path / CAPTIONS, content)
    assert captions is None or all("<new1>" in caption for caption in captions)


@thorough
@given(labels=JSON | st.dictionaries(st.sampled_from(["0", "1"]), st.text(max_size=4) | JSON))
def test_labels(tmp_path, labels):
    (tmp_path / "val").mkdir(exist_ok=True)
    (tmp_path / "val" / "0_1.png").touch()
    result = answer(lambda path: read_data(path.parent), tmp_path / "id2label.json", json.dumps(labels).encode("utf-8", "surrogatepass"))
    assert result is None or "0" in result[2]


@thorough
@given(data=st.data())
def test_embeddings(tmp_path, data):
    result = answer(read_embedding, tmp_path / "new1.safetensors", data.draw(damaged(save({"<new1>": torch.randn(2, 8)}))))
    assert result is None or (result[1].ndim == 2 and result[1].isfinite().all())


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@thorough
@given(data=st.data())
def test_checkpoints(tmp_path, suffix, data):
    weights, file = {"model.diffusion_model.a": torch.randn(3), "b": torch.randn(2, 2)}, io.BytesIO()
    torch.save({"state_dict": weights, "epoch": 1}, file)
    result = answer(read_checkpoint, tmp_path / f"a{suffix}", data.draw(damaged(save(weights) if suffix == ".safetensors" else file.getvalue())))
    assert result is None or all(isinstance(tensor, torch.Tensor) for tensor in result.values())


@thorough
@given(data=st.data())
def test_pictures(tmp_path, data):
    file = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(file, data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP"])))
    result = answer(lambda path: read_pictures(path.parent), tmp_path / "a.png", data.draw(damaged(file.getvalue())))
    assert result is None or result[0]["a.png"].mode == "RGB"


@thorough
@given(data=st.data())
def test_merges(tmp_path, data):
    answer(read_merges, tmp_path / "bpe.txt.gz", data.draw(damaged(gzip.compress(b"#version: 0.2\na b\nab c</w>\n", mtime=0))))


def test_a_pickle_runs_no_code(tmp_path):
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps({"state_dict": Bomb(tmp_path / "exploded")}))
    weights = {"model.diffusion_model.a": torch.zeros(1), "first_stage_model.b": torch.zeros(1)}
    torch.save({"state_dict": weights, "callbacks": Bomb(tmp_path / "exploded")}, tmp_path / "zip.ckpt")
    for name in ("plain.ckpt", "zip.ckpt"):
        try:
            assert set(read_checkpoint(tmp_path / name)) == set(weights)  # its call left inert
        except UserError as error:
            assert "\n" not in str(error)
    assert not (tmp_path / "exploded").exists()
