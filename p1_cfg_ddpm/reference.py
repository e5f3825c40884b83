"""Statistics of sets of images in a classifier's features, and those of the real images, bundled as numbers.

    python -m p1_cfg_ddpm.reference --data hw2_data/digits      # writes runs/reference.safetensors
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from .classifier import bundled_classifier, classify, load_classifier
from .data import load_digits
from .files import UserError, run, writable_file
from .model import BUNDLED, DOMAINS, NUM_DIGITS
from .tensors import load_weights, save_weights

REFERENCE = BUNDLED / "reference.safetensors"


@dataclass
class Statistics:
    """mean [F] and covariance [F, F] of the features; mean distance between two images of the same digit, per digit [10],
    in the features and in the pixels (root mean square, 0..255). All float64."""

    mean: torch.Tensor
    covariance: torch.Tensor
    feature_diversity: torch.Tensor
    pixel_diversity: torch.Tensor


def statistics(images, digit, features):
    """images uint8 [N, 28, 28, 3], digit int [N] (what each was meant to be), features float64 [N, F]."""
    pixels = torch.from_numpy(images.reshape(len(images), -1)).double()
    groups = [torch.from_numpy(np.flatnonzero(digit == d)) for d in range(NUM_DIGITS)]
    return Statistics(features.mean(dim=0), features.T.cov(),
                      torch.stack([mean_pairwise_distance(features[g]) for g in groups]),
                      torch.stack([mean_pairwise_distance(pixels[g]) for g in groups]) / pixels.shape[1] ** 0.5)


def mean_pairwise_distance(x):
    """Mean Euclidean distance over all pairs of different rows of x [N, F]; NaN for fewer than two rows."""
    return torch.pdist(x).mean()


def frechet_distance(a, b):
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) between two `Statistics` (Heusel et al. 2017), here in a classifier's features.

    The trace of the root of C1 C2 is the sum of the roots of the eigenvalues of C1^(1/2) C2 C1^(1/2), which is symmetric."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    return float((a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * cross)


def load_reference():
    """Returns ({domain: Statistics} of the real validation images, facts about them)."""
    tensors, facts = load_weights(REFERENCE)
    try:
        return {d: Statistics(*(tensors[f"{d}.{name}"].double() for name in Statistics.__annotations__)) for d in DOMAINS}, facts
    except KeyError as error:
        raise UserError(f"{REFERENCE} lacks {error}; it is not the file that this project comes with") from None


def main():
    parser = argparse.ArgumentParser(description="Computes the reference statistics of the real validation images, with the bundled classifiers.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with mnistm/ and svhn/ in the course's layout")
    parser.add_argument("--output", type=Path, default=Path("runs/reference.safetensors"), help="the file to write")
    args = parser.parse_args()
    writable_file(args.output)
    tensors, facts = {}, {}
    for domain in DOMAINS:
        data = load_digits(args.data, "val", (domain,))
        predicted, features = classify(load_classifier(bundled_classifier(domain)), data.images)
        own = statistics(data.images, data.digit, features)
        # as many as the grader's files against all others: what images that are real would score
        some = np.concatenate([np.flatnonzero(data.digit == d)[:50] for d in range(NUM_DIGITS)])
        others = np.setdiff1d(np.arange(len(data)), some)
        if len(others) < 2:
            raise UserError(f"{args.data / domain} has {len(data)} validation images; more than 50 of each digit are needed")
        halves = [statistics(data.images[part], data.digit[part], features[part]) for part in (some, others)]
        facts[domain] = {"images": len(data), "accuracy_on_real": float((predicted.numpy() == data.digit).mean()),
                         "frechet_of_500_real": frechet_distance(*halves),
                         "feature_diversity": own.feature_diversity.mean().item(), "pixel_diversity": own.pixel_diversity.mean().item()}
        tensors |= {f"{domain}.{name}": value.float() for name, value in vars(own).items()}
    save_weights(args.output, tensors, facts)
    print(f"wrote {args.output}: {facts}")


if __name__ == "__main__":
    run(main)
