"""What passes between open_clip's and transformers' formats."""

import gzip

import open_clip
import pytest
import torch

from p3_clip_textual_inversion.clip import load_clip, make_clip_tokenizer, read_merges
from p3_clip_textual_inversion.files import UserError
from p3_clip_textual_inversion.miniature.models import to_text_encoder, write_merges

TEXTS = ["a drawing of a four leaf clover on a green background", "a dog", "it's 42 degrees, ünder the sun!", ""]


@torch.inference_mode()
def hidden_states(clip, tokens):
    """open_clip's text hidden states after the last LayerNorm, [B, length, width]: what Stable Diffusion conditions on."""
    x = clip.token_embedding(tokens) + clip.positional_embedding[:tokens.shape[1]]
    return clip.ln_final(clip.transformer(x, attn_mask=clip.attn_mask[:tokens.shape[1], :tokens.shape[1]]))


def check_tokenizers(bpe_path, merges, length):
    theirs, ours = open_clip.SimpleTokenizer(**({"bpe_path": str(bpe_path)} if bpe_path else {}), context_length=length), make_clip_tokenizer(merges, length)
    expected = theirs(TEXTS)
    tokens = ours(TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt").input_ids
    assert tokens.shape == expected.shape and ours.eos_token_id == theirs.eot_token_id and len(ours) == theirs.vocab_size
    ends = (expected == theirs.eot_token_id).int().argmax(1)
    for i, end in enumerate(ends):
        assert tokens[i, :end + 1].tolist() == expected[i, :end + 1].tolist()
        assert set(tokens[i, end:].tolist()) == {ours.eos_token_id}  # transformers pads with the end


def test_the_tokenizer_is_clips(tmp_path):
    check_tokenizers(None, read_merges(), 77)


def test_a_smaller_vocabulary_is_read_alike_by_both_and_as_the_whole_one(tmp_path):
    texts = ["a red dog near evergreen trees", "crocodiles"]
    count = write_merges(tmp_path / "bpe.txt.gz", texts)
    merges = read_merges(tmp_path / "bpe.txt.gz")
    assert len(merges) == count < 60
    check_tokenizers(tmp_path / "bpe.txt.gz", merges, 32)
    small, whole = make_clip_tokenizer(merges), make_clip_tokenizer(read_merges())
    for text in texts:
        assert small.tokenize(text) == whole.tokenize(text)


def test_bad_merges_end_in_one_line(tmp_path):
    path = tmp_path / "bpe.txt.gz"
    for content, message in ((b"no gzip", "cannot read the BPE merges"), (gzip.compress(b"#v\na b\nx y z"), "two parts")):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message):
            read_merges(path)


@pytest.mark.parametrize("quick", [False, True])
def test_text_encoder_agrees(tiny_clip, quick):
    clip, _, tokenizer = load_clip(tiny_clip)
    if quick:
        for block in clip.transformer.resblocks:
            block.mlp.gelu = open_clip.transformer.QuickGELU()
    ours = make_clip_tokenizer(read_merges(tiny_clip / "bpe.txt.gz"), 24)
    encoder = to_text_encoder(clip, ours)
    tokens = tokenizer(TEXTS[:2])
    padded = ours(TEXTS[:2], padding="max_length", truncation=True, max_length=24, return_tensors="pt").input_ids
    expected, states = hidden_states(clip, tokens), encoder(padded).last_hidden_state
    for i, end in enumerate(tokens.argmax(1)):
        assert (states[i, :end + 1] - expected[i, :end + 1]).abs().max() < 1e-4
    assert expected[0, 1:5].std() > 0.1
    end = expected[range(2), tokens.argmax(1)]
    assert torch.allclose(end @ clip.text_projection, clip.encode_text(tokens), atol=1e-5)
