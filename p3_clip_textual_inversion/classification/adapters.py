"""What makes a zero-shot classifier better without training: the unlabelled pictures themselves, or a few labelled ones of the user's own.

Features are float32 [N, dim] of length 1, logits float64 [N, classes]: CLIP's scaled cosines.
"""

from pathlib import Path

import numpy as np
import torch

from ..data import labelled_pictures
from ..files import UserError
from ..measures import paired, ranking, wilson
from .cache import digest
from .outcome import cosines_of, outcome_of, write_predictions

NEIGHBOURS, SURE = 3, 8  # TransCLIP's: pictures that pull at each other, and the surest pictures of a class, from which its first mean is made
ROUNDS, INNER = 10, 5
ALPHAS, BETAS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0), (1.0, 2.75, 5.5, 11.0, 22.0)  # between which labelled pictures choose
DRAWS = 5  # of labelled pictures from the data itself
ALPHA, BETA = 1.0, 5.5  # Tip-Adapter's own, where there is one picture a class and none to try it on


def transduce(features, logits):
    """Assignments float64 [N, classes] of pictures that are classified together: the zero-shot part of TransCLIP (Zanella et al. 2024).

    A mixture of Gaussians, one a class with a common diagonal variance, fitted to the unlabelled features, held by two terms: each assignment stays near the
    captions' softmax, and near those of its nearest pictures. No label is used. But a picture's class now hangs on which others come with it: where most of
    the classes have no pictures, or a class only two or three, it does harm."""
    features, texts = features.double(), logits.log_softmax(1)
    similarity = features @ features.T
    similarity.fill_diagonal_(0)
    near = similarity.topk(min(NEIGHBOURS, len(features) - 1), dim=1)
    weights = torch.zeros_like(similarity).scatter_(1, near.indices, near.values.clamp(min=0))
    z = texts.exp()
    surest = z.topk(min(SURE, len(z)), dim=0).indices.T  # [classes, SURE]
    mean = torch.nn.functional.normalize(features[surest].mean(1), dim=-1)
    variance = torch.full((features.shape[1],), 1 / features.shape[1], dtype=torch.float64)
    for _ in range(ROUNDS):
        distance = ((features**2 / variance).sum(1)[:, None] - 2 * (features / variance) @ mean.T + (mean**2 / variance).sum(1))
        for _ in range(INNER):
            z = (texts - distance / 2 + weights @ z).softmax(1)
        share = z.sum(0)
        mean = (z.T @ features) / share.clamp(min=1e-9)[:, None]
        variance = ((z.sum(1) @ features**2 - (share[:, None] * mean**2).sum(0)) / len(features)).clamp(min=1e-9)
    return z


def transductive_limits(features, logits, truth):
    """Where `transduce` is asked too much: with two pictures of each class, and with pictures of the first fifth of the classes only; beside zero-shot."""
    within = torch.stack([(truth[:i + 1] == truth[i]).sum() for i in range(len(truth))])
    limits = {}
    for name, chosen in (("two_a_class", within <= 2), ("a_fifth_of_the_classes", truth < -(-logits.shape[1] // 5))):
        some, zero = features[chosen], logits[chosen]
        adapted, plain = (hits_of(scores, truth[chosen]) for scores in (transduce(some, zero), zero))
        limits[name] = {"images": len(some), "top1": adapted / len(some), "difference": (adapted - plain) / len(some)}
    return limits


def hits_of(scores, truth):
    return int((ranking(scores)[:, 0] == truth).sum())


def tip_adapter(logits, affinity, labels, alpha, beta):
    """Logits float64 [N, classes] with what labelled pictures add (Tip-Adapter, Zhang et al. 2022, eq. 5): alpha exp(-beta (1 - cosine)) for the class of each.

    affinity: cosines [N, shots] to the labelled pictures, of classes `labels`, int [shots]."""
    votes = torch.zeros(len(labels), logits.shape[1], dtype=torch.float64).scatter_(1, labels[:, None], 1.0)
    return logits + alpha * (-beta * (1 - affinity.double())).exp() @ votes


def choose_strength(shots, logits, labels):
    """(alpha, beta) at which the labelled pictures classify each other best, each by the others alone: no picture that is to be classified has a part in it.

    shots: features [shots, dim]; logits: CLIP's of them."""
    if labels.bincount().max() < 2:
        return ALPHA, BETA
    affinity = shots @ shots.T
    affinity.fill_diagonal_(-torch.inf)

    def likelihood(pair):
        return tip_adapter(logits, affinity, labels, *pair).log_softmax(1).gather(1, labels[:, None]).mean().item()

    return max(((alpha, beta) for alpha in (0.0, *ALPHAS) for beta in BETAS), key=likelihood)


def another_way(name, logits, data, zero_shot, output):
    """What another way than zero-shot gives, beside zero-shot on the same pictures; its own CSV."""
    outcome = outcome_of(logits, data.truth)
    write_predictions(output / f"predictions_{name}.csv", data, outcome)
    hits, count = int(outcome.right.sum()), len(data.truth)
    return {"top1": hits / count, "interval": wilson(hits, count), **paired(outcome.right, zero_shot.right)}


def few_shot(grader, features, logits, classes, data, zero_shot, shots, output):
    """Rows of results with labelled pictures. shots: a folder of the user's own, or numbers of pictures a class, drawn from the data and judged on the rest."""
    if len(shots) == 1 and not shots[0].isdigit():
        paths, labels = read_shots(shots[0], data)
        known = grader.of_files(paths)
        alpha, beta = choose_strength(known, grader.logits[0] * cosines_of(known, classes, data.label), labels)
        way = another_way("few_shot", tip_adapter(logits, features @ known.T, labels, alpha, beta), data, zero_shot, output)
        return [{"shots": len(paths), "folder": Path(shots[0]).name, "alpha": alpha, "beta": beta, **way}]
    rows = []
    for number in map(int, shots):
        hits = []
        for seed in range(DRAWS):
            mixed = torch.from_numpy(np.random.default_rng(seed).permutation(len(data.truth)))
            chosen = torch.zeros(len(mixed), dtype=torch.bool)
            chosen[torch.cat([mixed[data.truth[mixed] == k][:number] for k in range(len(data.names))])] = True
            if chosen.all():
                raise UserError(f"--shots {number} leaves no picture to be classified")
            alpha, beta = choose_strength(features[chosen], logits[chosen], data.truth[chosen])
            adapted = tip_adapter(logits[~chosen], features[~chosen] @ features[chosen].T, data.truth[chosen], alpha, beta)
            hits.append([hits_of(scores, data.truth[~chosen]) for scores in (adapted, logits[~chosen])])
        (few, zero), count = zip(*hits), int((~chosen).sum())  # the same at each draw
        rows.append({"shots": number, "draws": DRAWS, "images": count, "top1": sum(few) / (count * DRAWS), "lowest": min(few) / count,
                     "highest": max(few) / count, "zero_shot": sum(zero) / (count * DRAWS)})
    return rows


def read_shots(folder, data):
    """(paths, classes int [shots]) of labelled pictures named as those of the data, none of which may be among them."""
    folder = Path(folder)
    paths, _ = labelled_pictures(folder / "val" if (folder / "val").is_dir() else folder)
    numbers = [path.stem.split("_")[0] for path in paths]
    for path, number in zip(paths, numbers):
        if number not in data.numbers:
            raise UserError(f"{path} begins with {number!r}, which is no class id of the data; expected {{class id}}_{{number}}.png")
    if not paths:
        raise UserError(f"--shots {folder} has no pictures; expected {{class id}}_{{number}}.png, or numbers of pictures a class")
    asked = {digest(path): path for path in data.paths}
    for path in paths:
        if twin := asked.get(digest(path)):
            raise UserError(f"{path} is the picture {twin}, which is to be classified: it would be its own answer")
    return paths, torch.tensor([data.numbers.index(number) for number in numbers])
