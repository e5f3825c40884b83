"""What a word's training lowers, and what it changes for that: the loss of textual inversion on captions and latents, the best state by it on crops that
nothing is learned from; the rows and weights that learn, what holds them back, and what is kept of them to go on from."""

from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import diffusion
from .custom_diffusion import projections
from .lora import add_lora, free_directions, keep_free
from .state import fitting, refuse_nonfinite, restore, save_state
from .training import Validation

VALIDATED = 64  # kept latents, at a moment each
NEEDED = ("step", "history", "recent", "trained", "best")  # of a state


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

    def put_back(self, trained):
        """What is trained becomes the best that it has been."""
        for name, parameter in trained.items():
            parameter.data.copy_(self.kept[name])

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


@dataclass
class Run:
    """A training on its way: what its steps change, and how it is known when it goes on."""

    state_file: Path
    settings: dict  # what decides it
    trained: dict  # {name: Parameter}: "rows" [words * vectors, dim], and the weights that learn beside them
    initial: torch.Tensor  # the rows as they began
    free: torch.Tensor | None  # of `free_directions`, with --lora
    loss: Loss
    model: torch.nn.Module  # the loss too, wrapped for this machine and its processes
    optimizer: torch.optim.Optimizer
    best: Best
    snapshots: dict  # {step: rows} on the way
    step: int = 0
    history: list = field(default_factory=list)  # the rows of log.csv
    recent: list = field(default_factory=list)  # losses since the last row, float32 []

    @property
    def weights(self):
        """What learns beside the rows."""
        return {name: parameter for name, parameter in self.trained.items() if name != "rows"}


def make_run(parts, rows, held_out, config, row, accelerator, state_file, settings, state):
    """A `Run` from its beginning, or from where its state is.

    rows: Parameter of the words, [words * vectors, dim]; held_out: `Source`, for `Best`; config: train.py's `TrainConfig`; row: the model's `Defaults`."""
    trained, free, initial = {"rows": rows}, None, rows.detach().clone()
    snapshots = {0: initial}
    if config.custom_diffusion:  # float32, like whatever an optimiser changes; autocast still computes in `dtype`
        trained |= {name: module.float().weight.requires_grad_(True) for name, module in projections(parts.unet).items()}
    if config.lora:
        trained |= add_lora(parts.unet, config.lora, config.seed)
        free = free_directions(parts, row.templates["object"], config.hold)
    if state:
        with fitting(state_file):
            for name, parameter in trained.items():
                parameter.data.copy_(state["trained"][name])
            snapshots = {at: rows.to(accelerator.device) for at, rows in state["snapshots"].items()}
    loss = Loss(parts, config.min_snr_gamma or None)
    best = Best(loss, parts, held_out, accelerator, config.batch_size, state["best"] if state else None)
    model, optimizer = accelerator.prepare(loss, make_adamw(trained, config))
    run = Run(state_file, settings, trained, initial, free, loss, model, optimizer, best, snapshots)
    if state:
        run.step, run.history, run.recent = restore(state_file, state, accelerator, optimizer=optimizer)
    else:
        best.update(0, trained)
        refuse_nonfinite(0, [torch.tensor(best.losses[0])], state_file)  # beside which nothing would be better
    return run


def make_adamw(trained, config):
    """AdamW for the words and, at a rate of their own, for the weights beside them. "share": of a group's rate in --lr."""
    others = [parameter for name, parameter in trained.items() if name != "rows"]
    groups = [{"params": [trained["rows"]], "share": 1.0}]
    groups += [{"params": others, "share": (config.lr_lora if config.lora else config.lr_projections) / config.lr}] if others else []
    return torch.optim.AdamW(groups, lr=config.lr, weight_decay=0.0)


def set_rates(run, config, strength):
    """The learning rates of the next step; those of low rank wait until the pivot. strength: 0..1"""
    for group in run.optimizer.param_groups:
        waits = config.lora and group is not run.optimizer.param_groups[0] and run.step < config.pivot * config.steps
        group["lr"] = 0.0 if waits else group["share"] * config.lr * strength


@torch.no_grad()
def hold_back(run, config, share):
    """After a step: low-rank weights do not hear ordinary prompts, the rows go `share` of their way back to the initial ones, and keep those' lengths."""
    if config.lora:
        keep_free(run.weights, run.free)
    rows = run.trained["rows"]
    rows.lerp_(run.initial, share)
    if config.norm == "keep":
        rows.mul_(run.initial.norm(dim=1, keepdim=True) / rows.norm(dim=1, keepdim=True))


def pull_of_step(pull, strength, total):
    """The share of the way back to the initial words that one step goes, where a whole run goes `pull` of it, however many steps it has: 1 - pull is the
    product of all steps' 1 - share. strength: of the step, 0..1; total: the sum of all steps' strengths."""
    return 1 - (1 - pull) ** (strength / total)


def on_cpu(snapshots):
    """{step: rows}, brought from the GPU in one copy."""
    return {at: rows.clone() for at, rows in zip(snapshots, torch.stack(list(snapshots.values())).cpu())}


def save_run(run, accelerator):
    """Writes what `make_run` goes on from, if it is finite."""
    refuse_nonfinite(run.step, [*run.recent, *run.trained.values()], run.state_file)
    save_state(run.state_file, accelerator, run.settings, run.step, run.history, run.recent, trained={name: p.detach() for name, p in run.trained.items()},
               optimizer=run.optimizer, snapshots=on_cpu(run.snapshots), best={"losses": run.best.losses, "kept": run.best.kept})
