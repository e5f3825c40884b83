"""What a word's training lowers: the loss of textual inversion on captions and latents, and the best state by it on crops that nothing is learned from."""

from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import diffusion
from .training import Validation

VALIDATED = 64  # kept latents, at a moment each


class Loss(torch.nn.Module):
    """The training loss as a function of token ids; what accelerate wraps."""

    def __init__(self, parts, min_snr_gamma):
        super().__init__()
        self.text_encoder, self.unet, self.alpha_bar, self.gamma = parts.text_encoder, parts.unet, parts.alpha_bar.to(parts.device), min_snr_gamma
        self.tokens = parts.tokens

    def ids(self, texts):
        """(captions int [N, context], which of them each text is, int [B]): a few pictures have few captions, and each is encoded once."""
        captions, which = self.tokens(texts).unique(dim=0, return_inverse=True)
        return tuple(part.to(self.alpha_bar.device, non_blocking=True) for part in (captions, which))

    def forward(self, x0, t, eps, captions, which):
        """x0, eps: [B, 4, h, w]; t: [B]; captions, which: of `ids`. The mean over the batch."""
        return self.each(x0, t, eps, captions, which).mean()

    def each(self, x0, t, eps, captions, which):
        """One value per latent, [B]."""
        # On a CPU the gradient of attention is faster written out than in blocks, where the square of the positions is small.
        # Not with checkpoints, which compute it again later, outside this choice.
        small = x0.device.type == "cpu" and x0.shape[2] * x0.shape[3] <= 1024 and not self.unet.is_gradient_checkpointing
        with sdpa_kernel(SDPBackend.MATH) if small else nullcontext():
            hidden = self.text_encoder(captions).last_hidden_state[which]
            return diffusion.loss(self.unet, self.alpha_bar, x0, t, eps, hidden, self.gamma)


class Best:
    """The state of what is trained with the lowest loss on kept crops at kept moments with kept noises, so that two states differ by themselves alone; what a
    training ends with. The last state need not be better than an earlier one, nor than the words that it began with.

    losses: {step: loss}; kept: {name: tensor} of the best."""

    def __init__(self, loss, parts, held, accelerator, batch_size, state=None):
        self.loss, self.parts, self.held, self.accelerator, self.batch_size = loss, parts, held, accelerator, batch_size
        self.validation = Validation(len(held.means), held.means.shape[1:], VALIDATED)
        self.losses, self.kept = (state["losses"], state["kept"]) if state else ({}, None)

    def of(self, index, t, eps):
        ids = self.loss.ids([self.held.captions[i] for i in index.cpu().tolist()])
        return self.loss.each(self.parts.vae.config.scaling_factor * self.held.means[index], t, eps, *ids)

    def update(self, step, trained):
        """Measures, and keeps what is the best so far. Returns what `Validation` does."""
        measured = self.validation(self.of, self.accelerator, self.batch_size)
        self.losses[step] = measured["validation"]
        if self.losses[step] == min(self.losses.values()):
            self.kept = {name: tensor.detach().clone() for name, tensor in trained.items()}
        return measured

    @property
    def step(self):
        return min(self.losses, key=self.losses.get)

    def told(self, words):
        """What became of the words, in a line."""
        first, last, best = self.losses[0], max(self.losses), self.step
        text = f"{words}: loss on kept crops {first:.4f} with the initial words, {self.losses[last]:.4f} at the end"
        if best == 0:
            return f"{text}; note: no state is better than the initial words, which are kept: try another --lr, more --steps or other initial words"
        worse = " (the end is worse than the initial words)" if self.losses[last] >= first else ""
        return f"{text}{worse}; the best is kept, {self.losses[best]:.4f} at step {best}"
