"""What is counted and estimated of a classifier: shares with their intervals, ranks, two classifiers on the same pictures, calibration.

Scores are float64 [N, classes], the larger the likelier; truth is int [N]; `right` is bool [N]. An interval is [low, high], of 95 %.
"""

import math
from fractions import Fraction

import numpy as np
import torch
from PIL import Image

DRAWS = 10_000  # of a bootstrap
BINS = 15  # of the expected calibration error, as in Guo et al. 2017
TEMPERATURES = (0.01, 100.0)  # between which one is sought


def wilson(hits, count, z=1.96):
    """Wilson's 95 % interval of a share."""
    p = hits / count
    middle, half = p + z**2 / (2 * count), z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return [max((middle - half) / (1 + z**2 / count), 0.0), min((middle + half) / (1 + z**2 / count), 1.0)]


def share(found):
    """Of bool [N]: the share that is true, its 95 % interval, the number."""
    hits = int(found.sum())
    return {"share": hits / len(found), "interval": wilson(hits, len(found)), "pictures": len(found)}


def ranking(scores):
    """The classes of each picture, likeliest first, int [N, classes]. Of equal scores the class that comes first counts as the likelier, everywhere."""
    return scores.sort(dim=1, descending=True, stable=True).indices


def ranks(order, truth):
    """The rank, from 1, of each picture's class in its `ranking`: int [N]."""
    return (order == truth[:, None]).int().argmax(1) + 1


def recalls(right, truth):
    """{class: (hits, count)} of the classes that have pictures."""
    return {k: (int(right[truth == k].sum()), int((truth == k).sum())) for k in truth.unique().tolist()}


def mean(counts):
    """The mean of shares (hits, count), as near as a float can be to the fraction that it is."""
    shares = [Fraction(hits, count) for hits, count in counts]
    return float(sum(shares) / len(shares))


def percentiles(draws):
    """Of sums of fractions, whose last bits are the additions'."""
    return [round(float(q), 12) for q in np.percentile(draws, [2.5, 97.5])]


def mean_recall_interval(counts, seed=0):
    """Of the mean over the classes, by resampling each class's own pictures. counts: as `recalls` gives them."""
    hits, of = np.array(list(counts.values())).T
    return percentiles((np.random.default_rng(seed).binomial(of, hits / of, (DRAWS, len(of))) / of).mean(1))


def paired(right, other, seed=0):
    """Of two classifiers on the same pictures: how much larger the first one's share is, the interval of that by a bootstrap over pictures, and the p of
    McNemar's exact test: how likely so uneven a split of the pictures on which they differ is, if both were equally good."""
    count, more, fewer = len(right), int((right & ~other).sum()), int((~right & other).sum())
    draws = np.random.default_rng(seed).multinomial(count, np.array([more, fewer, count - more - fewer]) / count, DRAWS)
    return {"difference": (more - fewer) / count, "difference_interval": percentiles((draws[:, 0] - draws[:, 1]) / count), "mcnemar_p": mcnemar(more, fewer)}


def mcnemar(more, fewer):
    """The two-sided p of a split of `more` and `fewer` under equal chances."""
    n, k = more + fewer, torch.arange(min(more, fewer) + 1, dtype=torch.float64)
    log_chance = math.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1) - n * math.log(2)
    return min(2 * log_chance.exp().sum().item(), 1.0)


def reliability(confidence, right, bins=BINS):
    """[(count, mean confidence, share right)] of bins of equal width over 0..1, those without pictures left out. confidence: [N], of the first guess."""
    which = (confidence * bins).ceil().clamp(1, bins)
    return [(int(here.sum()), confidence[here].mean().item(), right[here].double().mean().item())
            for b in range(1, bins + 1) if (here := which == b).any()]


def expected_calibration_error(confidence, right, bins=BINS):
    """By how much confidence and share right differ, the mean over pictures of their bins' difference (Guo et al. 2017, eq. 3)."""
    return sum(count * abs(sure - share) for count, sure, share in reliability(confidence, right, bins)) / len(right)


def fit_temperature(logits, truth):
    """The T at which softmax(logits / T) has the least negative log-likelihood (Guo et al. 2017, section 4.2): convex in 1/T, so by bisection of its slope."""
    low, high = (math.log(1 / t) for t in TEMPERATURES[::-1])
    for _ in range(40):
        middle = (low + high) / 2
        expected = ((logits * math.exp(middle)).softmax(1) * logits).sum(1)
        if (expected - logits.gather(1, truth[:, None])[:, 0]).mean() < 0:  # the likelihood still grows with 1/T
            low = middle
        else:
            high = middle
    return math.exp(-middle)


def cross_fit_temperature(logits, truth, folds=5, seed=0):
    """(fold int [N], temperature [N] of each picture, fitted on the other folds): no picture's label has a part in its own confidence."""
    folds = min(folds, len(truth))
    fold = torch.from_numpy(np.random.default_rng(seed).permutation(len(truth)) % folds)
    temperature = torch.ones(len(truth), dtype=torch.float64)
    for f in range(folds if folds > 1 else 0):
        temperature[fold == f] = fit_temperature(logits[fold != f], truth[fold != f])
    return fold, temperature


def drift(pictures, originals, grader):
    """How far ordinary prompts' pictures have moved: mean difference in grey levels, and 100 cosine of CLIP's features. Lists of uint8 [H, W, 3]."""
    levels = np.abs(np.stack(pictures).astype(float) - np.stack(originals)).mean()
    ours, theirs = (grader.of_pictures([Image.fromarray(p) for p in group]) for group in (pictures, originals))
    return {"grey_levels": float(levels), "clip_cosine": float(100 * (ours * theirs).sum(1).mean())}
