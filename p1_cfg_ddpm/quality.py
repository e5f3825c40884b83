"""How near a set of images comes to real ones: Frechet distance, precision, recall, density and coverage, in the features of any network.

    python -m p1_cfg_ddpm.quality --data DIGITS      # writes runs/reference.safetensors: the features of the real validation images

Each is told as a ratio to what other *real* images score, as many and of the same digits, against the same reference: 1 is as good as real.
A single number hides what is wrong: precision falls where images lie outside the real ones, coverage where real ones are missing among them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from .classifier import bundled_classifier, classify, load_classifier
from .data import load_digits
from .embedding import bundled_embedding, embed, load_embedding
from .files import UserError, run, writable_file
from .model import BUNDLED, DOMAINS, NUM_DIGITS
from .provenance import HelpFormatter
from .tensors import load_weights, save_weights

REFERENCE = BUNDLED / "reference.safetensors"
PER_DIGIT = 50  # real images of each digit that take the place of generated ones, as many as the grader's files
NEIGHBOURS = 5
SPLITS = range(5)  # of the real images into a reference and those that stand for generated ones
MEASURES = ("frechet", "precision", "recall", "density", "coverage")


def frechet_distance(a, b):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two sets of features, float64 [N, F] and [M, F] (Heusel et al. 2017).

    The trace of the root of C1 C2 is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric."""
    (mean_a, cov_a), (mean_b, cov_b) = ((x.mean(dim=0), x.T.cov()) for x in (a, b))
    return frechet_of_gaussians(mean_a, cov_a, mean_b, cov_b)


def frechet_of_gaussians(mean_a, cov_a, mean_b, cov_b):
    """The same between two normal distributions; means [F], covariances [F, F], float64."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def radii(x, k=NEIGHBOURS):
    """The distance of each row of x [N, F] to its k-th nearest other row, [N]."""
    return torch.cdist(x, x).kthvalue(k + 1, dim=1).values  # the nearest is the row itself


def neighbourhood_measures(fake, real, k=NEIGHBOURS, reach=None):
    """How two sets of features, [N, F] and [M, F], cover each other, with balls around each row that reach to its k-th neighbour in its own set.
    reach: the real ones' `radii`, where they are known.

    precision: share of fake inside some real ball; recall: share of real inside some fake ball (Kynkaanniemi et al. 2019, eq. 1);
    density: how many real balls hold a fake row, over k; coverage: share of real balls that hold one (Naeem et al. 2020, eq. 3, 4)."""
    distance = torch.cdist(fake, real)  # [N, M]
    inside_real, inside_fake = distance <= (radii(real, k) if reach is None else reach), distance <= radii(fake, k)[:, None]
    return {"precision": inside_real.any(dim=1).double().mean().item(), "recall": inside_fake.any(dim=0).double().mean().item(),
            "density": inside_real.sum(dim=1).double().mean().item() / k, "coverage": inside_real.any(dim=0).double().mean().item()}


def compare(fake, real, reach=None):
    """All `MEASURES` of fake against real features, float64 [N, F] and [M, F]; reach as in `neighbourhood_measures`."""
    return {"frechet": frechet_distance(fake, real), **neighbourhood_measures(fake, real, reach=reach)}


def split_real(digit, seed, per_digit=PER_DIGIT):
    """(indices of `per_digit` images of each digit, indices of all others): the real images that stand for generated ones, and the reference.
    per_digit: int, or int [10]"""
    order = np.random.default_rng(seed).permutation(len(digit))
    some = np.concatenate([order[digit[order] == d][:count] for d, count in enumerate(np.broadcast_to(per_digit, NUM_DIGITS))])
    return some, np.setdiff1d(order, some)


def against_real(features, real, real_digit, seed=0, per_digit=PER_DIGIT, known=None):
    """`compare` of generated features with real ones, and the ratio of each measure to that of as many real images, for one split of the real ones.

    features float64 [N, F], real float64 [M, F], real_digit int [M]. known: a dict of the real ones' own measures by split, which this goes on to fill:
    they are most of the work, and the same for the next features. Returns {measure: {"value", "real", "ratio"}}."""
    some, others = split_real(real_digit, seed, per_digit)
    known, split = {} if known is None else known, (seed, *np.broadcast_to(per_digit, NUM_DIGITS).tolist())
    if split not in known:
        reach = radii(real[others])
        known[split] = reach, compare(real[some], real[others], reach)
    reach, theirs = known[split]
    ours = compare(features, real[others], reach)
    return {name: {"value": ours[name], "real": theirs[name], "ratio": ours[name] / theirs[name] if theirs[name] else float("nan")} for name in MEASURES}


def over_splits(features, digit, real, real_digit, splits=SPLITS, known=None):
    """`against_real` over several splits of the real images: the mean of each measure, and the ratio of the means. None for too few images.

    digit int [N]: what the images shall be; known: as there. The first `PER_DIGIT` of each digit count, and as many real ones stand for them: more would
    cover more."""
    per_digit = np.bincount(digit, minlength=NUM_DIGITS).clip(max=PER_DIGIT)
    if per_digit.sum() < 2 * NUM_DIGITS:
        return None
    first = np.sort(np.concatenate([np.flatnonzero(digit == d)[:PER_DIGIT] for d in range(NUM_DIGITS)]))
    scores = [against_real(features[first], real, real_digit, seed, per_digit, known) for seed in splits]
    means = {name: {part: float(np.mean([score[name][part] for score in scores])) for part in ("value", "real")} for name in MEASURES}
    return {name: mean | {"ratio": mean["value"] / mean["real"] if mean["real"] else float("nan")} for name, mean in means.items()}


def by_digit(features, digit, real, real_digit, splits=SPLITS):
    """Precision and coverage of each digit among its like, as ratios to real: {digit: {"precision", "coverage"}}."""
    scores = {}
    for d in range(NUM_DIGITS):
        own, theirs = features[digit == d][:PER_DIGIT], real[real_digit == d]
        if len(own) > NEIGHBOURS and len(theirs) > PER_DIGIT + NEIGHBOURS:
            rows = []
            for seed in splits:
                order = np.random.default_rng(seed).permutation(len(theirs))
                some, others = theirs[order[:len(own)]], theirs[order[PER_DIGIT:]]
                rows.append([neighbourhood_measures(x, others) for x in (own, some)])
            scores[str(d)] = {name: float(np.mean([ours[name] for ours, _ in rows]) / np.mean([real_[name] for _, real_ in rows]))
                              for name in ("precision", "coverage")}
    return scores


class Judges:
    """All that judges images here: the classifier and the second classifier of each domain, the embedding, and the features of real images."""

    def __init__(self, device="cpu", folder=BUNDLED):
        self.embedding = load_embedding(folder / "embedding.safetensors", device)
        self.first, self.second = ({domain: load_classifier(folder / f"{judge}_{domain}.safetensors", device) for domain in DOMAINS}
                                   for judge in ("classifier", "second"))
        self.reference, self.facts = load_reference(folder / REFERENCE.name)
        self.known = {(domain, name): {} for domain in DOMAINS for name in ("embedding", "classifier")}

    def scores(self, domain, images, digit):
        """images uint8 [N, 28, 28, 3], digit int [N]: what they shall be. Returns (scores, digits that the classifier reads, int [N])."""
        reference = self.reference[domain]
        (read, features), (read_again, _) = (classify(judge[domain], images) for judge in (self.first, self.second))
        read, embedded = read.numpy(), embed(self.embedding, images)
        groups = [np.flatnonzero(digit == d) for d in range(NUM_DIGITS)]
        scores = {"images": len(images), "accuracy": float((read == digit).mean()), "second_accuracy": float((read_again.numpy() == digit).mean()),
                  "accuracy_per_digit": {str(d): float((read[group] == d).mean()) for d, group in enumerate(groups) if len(group)},
                  # as a share of the real images' diversity, over the digits that have at least two images
                  "pixel_diversity": (pixel_diversity(images, digit) / reference["pixel_diversity"]).nanmean().item(),
                  "embedding": over_splits(embedded, digit, reference["embedding"], reference["digit"], known=self.known[domain, "embedding"]),
                  "classifier_features": over_splits(features, digit, reference["classifier"], reference["digit"], known=self.known[domain, "classifier"]),
                  "embedding_per_digit": by_digit(embedded, digit, reference["embedding"], reference["digit"])}
        return scores, read


def mean_pairwise_distance(x):
    """Mean Euclidean distance over all pairs of different rows of x [N, F]; NaN for fewer than two rows."""
    return torch.pdist(x).mean()


def load_reference(path=REFERENCE):
    """({domain: {"embedding" float64 [M, 128], "classifier" [M, 128], "digit" int [M], "pixel_diversity" [10]}}, facts) of real validation images."""
    tensors, facts = load_weights(path)
    try:
        return {domain: {name: tensors[f"{domain}.{name}"].numpy() if name == "digit" else tensors[f"{domain}.{name}"].double()
                         for name in ("embedding", "classifier", "digit", "pixel_diversity")} for domain in DOMAINS}, facts
    except KeyError as error:
        raise UserError(f"{path} lacks {error}; it is not the file that this project comes with") from None


def pixel_diversity(images, digit):
    """Mean distance between two images of the same digit, root mean square of grey levels, float64 [10]. images uint8 [N, 28, 28, 3], digit int [N]."""
    pixels = torch.from_numpy(images.reshape(len(images), -1)).double()
    return torch.stack([mean_pairwise_distance(pixels[np.flatnonzero(digit == d)]) for d in range(NUM_DIGITS)]) / pixels.shape[1] ** 0.5


def main():
    parser = argparse.ArgumentParser(description="Computes the features of the real validation images, with the bundled judges.",
                                     formatter_class=HelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnistm/ and svhn/ in the course's layout, or a .npz of it")
    parser.add_argument("--output", type=Path, default=Path("runs/reference.safetensors"), help="the file to write")
    args = parser.parse_args()
    writable_file(args.output)
    tensors, facts, embedding = {}, {}, bundled_embedding()
    for domain in DOMAINS:
        data = load_digits(args.data, "val", (domain,))
        if np.bincount(data.digit, minlength=NUM_DIGITS).min() <= PER_DIGIT:
            raise UserError(f"{args.data / domain} has {len(data)} validation images; more than {PER_DIGIT} of each digit are needed")
        predicted, features = classify(load_classifier(bundled_classifier(domain)), data.images)
        second, _ = classify(load_classifier(bundled_classifier(domain, "second")), data.images)
        tensors |= {f"{domain}.embedding": embed(embedding, data.images).half(), f"{domain}.classifier": features.half(),
                    f"{domain}.digit": torch.from_numpy(data.digit).to(torch.uint8), f"{domain}.pixel_diversity": pixel_diversity(data.images, data.digit)}
        facts[domain] = {"images": len(data), "accuracy_on_real": float((predicted.numpy() == data.digit).mean()),
                         "second_accuracy_on_real": float((second.numpy() == data.digit).mean())}
    save_weights(args.output, tensors, facts)
    print(f"wrote {args.output}: {facts}")


if __name__ == "__main__":
    run(main)
