"""Learned words and projections as others save them: what a file says is read, what it does not say is asked for, what is of no use is left out with a note."""

import pytest
import torch
from safetensors.torch import save_file

from p3_clip_textual_inversion.custom_diffusion import read_projections, weights_of
from p3_clip_textual_inversion.embedding import add_words, initial_rows, save_embedding
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.formats.words import gather, read_words
from p3_clip_textual_inversion.inference import DrawConfig, load_with_words
from p3_clip_textual_inversion.model import load_stable_diffusion

ROW, ROWS = torch.arange(8.0)[None] / 8 + 1, torch.arange(16.0).view(2, 8)
TABLE = torch.cat([torch.zeros(49408, 8), ROW])
KINDS = {  # name of the file: (content, what --embeddings says, the word's rows)
    "new1.pt": (ROW, "folder", ROW), "<new1>.pth": (ROW[0], "folder", ROW), "embedding_new1.pt": (torch.nn.Parameter(ROW), "folder", ROW),
    "a.pt": (ROW, "named", ROW), "b.bin": ({"<new1>": ROW[0]}, "folder", ROW), "learned_embeds.bin": ({"<new1>": ROW}, "file", ROW),
    "c.pth": ({"tokens": ["<new1>"], "token_ids": [49408], "embeddings": ROW}, "folder", ROW),
    "d.pth": ({"tokens": ["<new1>", "<new1>_1"], "token_ids": torch.tensor([49408, 49409]), "embeddings": ROWS}, "folder", ROWS),
    "e.pth": ({"tokens": "<new1>", "embeddings": {"<new1>": ROW}}, "folder", ROW),
    "webui.pt": ({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(ROWS)}, "name": "new1", "step": 3, "sd_checkpoint": None},
                 "folder", ROWS),
    "new1.ckpt": ({"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(ROWS)})}, "folder", ROWS),
    "f.pt": ({"string_to_token": {"*": 265}, "string_to_param": {"*": ROW}}, "named", ROW),
    "new1.safetensors": ({"emb_params": ROWS}, "folder", ROWS), "g.safetensors": ({"emb_params": ROWS}, "named", ROWS),
    "h.safetensors": ({"<new1>": ROW.half()}, "folder", ROW), "i.pt": ({"<new1>": ROW, "<new2>": ROWS}, "folder", ROW),
    "j.pt": ({"weight": ROW}, "named", ROW), "k.pt": (TABLE, "named", ROW), "l.bin": ({"<cat-toy>": ROW}, "named", ROW),
    "m.safetensors": ({"<new1>": ROW, "<new1>_1": ROW + 1}, "folder", torch.cat([ROW, ROW + 1])),
    "n.ckpt": ({"modifier_token": {"<new1>": ROW[0]}}, "folder", ROW),
}


def write(path, content):
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_file_gives_its_rows(tmp_path, name):
    content, how, rows = KINDS[name]
    write(tmp_path / name, content)
    source = {"folder": tmp_path, "file": tmp_path / name, "named": f"<new1>={tmp_path / name}"}[how]
    found, initials, origin = gather([source], ["<new1>"], ["a <new1>"], 8)
    assert found["<new1>"].dtype == torch.float32 and found["<new1>"].equal(rows.float()) and not initials and origin["<new1>"][0] == tmp_path / name


@pytest.mark.parametrize("old", [True, False])
def test_a_file_that_names_no_word_is_the_only_one(tmp_path, old):
    torch.save(ROW, tmp_path / "x.pt", _use_new_zipfile_serialization=not old)
    assert gather([tmp_path], ["<new1>"])[0]["<new1>"].equal(ROW)
    torch.save(ROW, tmp_path / "y.pt")
    with pytest.raises(UserError, match="has no embedding of <new1>"):
        gather([tmp_path], ["<new1>", "<new2>"])


def test_a_difference_is_added_to_the_row_of_its_word(tiny_sd, tmp_path):
    width = load_stable_diffusion(tiny_sd).text_encoder.config.hidden_size
    torch.save(torch.full((1, width), 0.5), tmp_path / "d.pt")
    torch.save({"delta": torch.full((1, width), 0.5), "initializer_token": "cat"}, tmp_path / "new1.pt")
    for source in (f"<new1>=cat+{tmp_path / 'd.pt'}", tmp_path / "new1.pt", f"<new1>={tmp_path / 'new1.pt'}"):
        vectors, initials, _ = gather([source], ["<new1>"], (), width)
        assert initials == {"<new1>": "cat"}
        parts = load_with_words(tiny_sd, torch.device("cpu"), DrawConfig(), vectors, initials=initials)
        cat = initial_rows(load_stable_diffusion(tiny_sd), "cat", 1)
        assert torch.allclose(parts.text_encoder.get_input_embeddings().rows, cat + 0.5)


def test_what_is_not_needed_is_left_out_with_a_note(tmp_path, capsys):
    save_embedding(tmp_path / "new1.safetensors", "<new1>", ROW)
    write(tmp_path / "cat.pt", ROW)
    write(tmp_path / "spaces.safetensors", {"two words": ROW})
    write(tmp_path / "sd2.bin", {"<new1>": torch.ones(1, 16)})
    write(tmp_path / "sdxl.safetensors", {"clip_l": ROW, "clip_g": ROW + 1})
    write(tmp_path / "nan.pt", {"<new3>": ROW * float("nan")})
    write(tmp_path / "style.pt", {"<style>": ROWS})
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "page.bin").write_text("<!DOCTYPE html>")
    found, _, _ = gather([tmp_path], ["<new1>"], ["a <new1> as <style>"], 8)
    err = capsys.readouterr().err
    assert list(found) == ["<new1>", "<style>"] and found["<new1>"].equal(ROW)
    for said in ("a nameless one (cat.pt)", "'two words'", "its vectors have 16 numbers", "Stable Diffusion XL", "<new3>", "a web page"):
        assert said in err, said
    assert "notes.txt" not in err


def test_two_files_of_one_word(tmp_path, capsys):
    for name, value in (("learned_embeds-steps-500", 1), ("learned_embeds-steps-1000", 2), ("learned_embeds", 3)):
        save_file({"<new1>": torch.full((1, 8), float(value))}, tmp_path / f"{name}.safetensors")
    assert gather([tmp_path], ["<new1>"])[0]["<new1>"].eq(3).all() and "is left out" in capsys.readouterr().err
    (tmp_path / "learned_embeds.safetensors").unlink()
    assert gather([tmp_path], ["<new1>"])[0]["<new1>"].eq(2).all()
    save_embedding(tmp_path / "mine.safetensors", "<new1>", ROW)
    save_embedding(tmp_path / "other.safetensors", "<new1>", ROW + 1)
    with pytest.raises(UserError, match="the word <new1> is in two files"):
        gather([tmp_path], ["<new1>"])
    save_embedding(tmp_path / "other.safetensors", "<new1>", ROW + 1, {"model": "sd_v1-0-1"})
    assert gather([tmp_path], ["<new1>"], model="sd_v1-0-1")[0]["<new1>"].equal(ROW + 1)


@pytest.mark.parametrize("content, said", [
    ([1, 2], "no learned word"), ({}, "0 tensors by name"), ({"<new1>": torch.ones(2, 2, 2)}, r"as torch.float32 \(2, 2, 2\)"),
    ({"<new1>": torch.ones(1, 8, dtype=torch.int8)}, "int8"), ({"<new1>": torch.ones(1, 8, dtype=torch.complex64)}, "complex64"),
    ({"<new1>": torch.ones(1, 8, dtype=torch.bool)}, "bool"), (ROW / 0, "finite"), ({"tokens": ["<a>", "<b>"], "embeddings": ROW}, "2 tokens and 1 embeddings"),
    (torch.ones(1).expand(4, 10**9), "too small"), ({"string_to_param": {}}, "0 tensors"), ({"clip_g": ROW}, "XL"), (torch.ones(0, 8), r"\(0, 8\)"),
    ({f"<{i}>": ROW for i in range(300)}, "300 tensors"), (torch.eye(8).to_sparse(), "expected finite floating point"),
    ({"<new1>": ROW, "<new1>_1": torch.ones(1, 8 + ROW.shape[1])}, "<new1> in vectors of .* expected one length")])
def test_what_is_no_word_is_said(tmp_path, content, said):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=said) as caught:
        read_words(tmp_path / "x.pt")
    assert str(tmp_path / "x.pt") in str(caught.value) and "\n" not in str(caught.value)


def test_a_word_that_no_prompt_has_cannot_be_given(tmp_path):
    with pytest.raises(UserError, match="names no word of the prompts; expected one of <new1>"):
        gather([f"<new9>={tmp_path}/x.pt"], ["<new1>"])
    with pytest.raises(UserError, match="no such embedding"):
        gather([f"<new1>={tmp_path}/x.pt"], ["<new1>"])


@pytest.mark.parametrize("kind", ["diffusers", "authors", "compressed", "original", "state_dict"])
def test_custom_diffusions_own_files(tiny_sd, tmp_path, kind):
    unet = load_stable_diffusion(tiny_sd).unet
    wanted = {name: weight + 1 for name, weight in weights_of(unet).items()}
    original = {name: original_name(name) for name in wanted}
    content = {"diffusers": {name.replace("attn2.to_", "attn2.processor.to_").replace(".weight", "_custom_diffusion.weight"): w for name, w in wanted.items()},
               "authors": {"unet": wanted, "modifier_token": {"<new1>": torch.ones(8)}},
               "compressed": {"unet": {name: {"u": torch.ones(len(w), 1), "v": torch.ones(1, w.shape[1])} for name, w in wanted.items()}},
               "original": {original[name]: w for name, w in wanted.items()},
               "state_dict": {"state_dict": {original[name]: w.half() for name, w in wanted.items()}, "embed": torch.ones(1, 8)}}[kind]
    torch.save(content, tmp_path / "delta.bin")
    found = read_projections(tmp_path / "delta.bin", unet)
    assert found.keys() == wanted.keys() and all(torch.allclose(found[name], wanted[name], atol=1e-2 if kind == "state_dict" else 1e-6) for name in wanted)


def original_name(name):
    """As the published checkpoints call it."""
    parts = name.split(".")
    if parts[0] == "mid_block":
        return "model.diffusion_model.middle_block.1." + ".".join(parts[3:])
    block, layer = int(parts[1]), int(parts[3])
    place = f"input_blocks.{3 * block + 1 + layer}" if parts[0] == "down_blocks" else f"output_blocks.{3 * block + layer}"
    return f"model.diffusion_model.{place}.1." + ".".join(parts[4:])


def test_projections_that_change_more_are_refused(tiny_sd, tmp_path):
    unet = load_stable_diffusion(tiny_sd).unet
    torch.save(weights_of(unet) | {"mid_block.attentions.0.transformer_blocks.0.attn2.to_q.weight": torch.ones(2, 2)}, tmp_path / "d.bin")
    with pytest.raises(UserError, match=r"also changes .*to_q\.weight"):
        read_projections(tmp_path / "d.bin", unet)


def test_words_of_two_sources(tiny_sd, tmp_path):
    parts = load_stable_diffusion(tiny_sd)
    width = parts.text_encoder.config.hidden_size
    torch.save(torch.ones(1, width), tmp_path / "a.pt")
    save_embedding(tmp_path / "b.safetensors", "<x>", torch.zeros(1, width))
    found, _, _ = gather([f"<new1>={tmp_path / 'a.pt'}", f"<new2>={tmp_path / 'b.safetensors'}"], ["<new1>", "<new2>"])
    assert add_words(parts, found).rows.mean(1).tolist() == [1, 0]
