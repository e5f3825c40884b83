"""The measures on sets whose answers are known."""

import numpy as np
import pytest
import torch

from p1_cfg_ddpm.quality import (
    against_real,
    by_digit,
    compare,
    frechet_distance,
    frechet_of_gaussians,
    mean_pairwise_distance,
    neighbourhood_measures,
    over_splits,
    split_real,
)


def normal(n, seed, scale=1.0, shift=0.0, dim=3):
    return shift + scale * torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_frechet_distance_in_closed_form():
    def gaussian(mean, covariance):
        return torch.tensor(mean).double(), torch.tensor(covariance).double()

    a, b = gaussian([0.0, 0.0], [[4.0, 0.0], [0.0, 1.0]]), gaussian([3.0, 4.0], [[1.0, 0.0], [0.0, 9.0]])
    assert frechet_of_gaussians(*a, *b) == pytest.approx(25 + (2 - 1) ** 2 + (1 - 3) ** 2)  # commuting: sum of (s1 - s2)^2
    assert frechet_of_gaussians(*a, *a) == pytest.approx(0, abs=1e-9)
    x, y = normal(5, 0, dim=5), normal(5, 1, dim=5)
    x, y = x @ x.T, y @ y.T
    root = torch.linalg.eigvals(x @ y).sqrt().real.sum()  # a second way to the same trace
    assert frechet_of_gaussians(torch.zeros(5), x, torch.zeros(5), y) == pytest.approx(float((x + y).trace() - 2 * root), rel=1e-6)
    assert frechet_distance(normal(20_000, 0), normal(20_000, 1, scale=2.0, shift=1.0)) == pytest.approx(3 + 3, rel=0.05)  # 3 dimensions, 1 + (2 - 1)^2 each


def test_neighbourhoods_counted_by_hand():
    """Real 0, 1, 10 have nearest neighbours 1, 1 and 9 away; fake 0.5 and 20 are 19.5 apart."""
    real, fake = (torch.tensor(values, dtype=torch.float64)[:, None] for values in ([0.0, 1.0, 10.0], [0.5, 20.0]))
    assert neighbourhood_measures(fake, real, k=1) == {"precision": 1 / 2, "recall": 1.0, "density": 2 / (1 * 2), "coverage": pytest.approx(2 / 3)}


def test_what_is_wrong_shows_where_it_should():
    real = torch.cat([normal(300, 0, shift=-10.0), normal(300, 1, shift=10.0)])
    good = compare(torch.cat([normal(300, 2, shift=-10.0), normal(300, 3, shift=10.0)]), real)
    half = compare(normal(600, 4, shift=10.0), real)  # one of two modes is missing
    timid = compare(torch.cat([normal(300, 5, 0.3, -10.0), normal(300, 6, 0.3, 10.0)]), real)  # all are there, too much alike
    wild = compare(torch.cat([normal(300, 7, 3.0, -10.0), normal(300, 8, 3.0, 10.0)]), real)
    assert good["precision"] > 0.95 and good["recall"] > 0.95 and good["coverage"] > 0.95 and good["density"] == pytest.approx(1, abs=0.1)
    assert half["precision"] > 0.95 and half["coverage"] < 0.55 and half["recall"] < 0.55 and half["frechet"] > 50 * good["frechet"]
    assert timid["precision"] > 0.98 and timid["density"] > 1 and timid["coverage"] < 0.7 and timid["recall"] < 0.5
    assert wild["precision"] < 0.6 and wild["density"] < 0.5 and wild["frechet"] > 10 * good["frechet"]


def test_as_many_other_real_ones_score_one():
    digit = np.arange(1200) % 10
    real = normal(1200, 0)
    some, others = split_real(digit, seed=3, per_digit=50)
    assert np.bincount(digit[some]).tolist() == [50] * 10 and len(some) + len(others) == 1200 and not set(some) & set(others)
    assert all(score["ratio"] == 1 for score in against_real(real[some], real, digit, seed=3).values())  # the very images that stand for the real ones
    ratios = [against_real(normal(500, 100 + seed), real, digit, seed=seed) for seed in range(5)]
    for name, within in (("precision", 0.05), ("coverage", 0.05), ("density", 0.1), ("frechet", 0.6)):
        assert np.mean([ratio[name]["ratio"] for ratio in ratios]) == pytest.approx(1, abs=within), name
    assert np.mean([against_real(normal(500, seed, 0.7), real, digit, seed=seed)["frechet"]["ratio"] for seed in range(3)]) > 3


def test_what_is_known_of_the_real_ones_belongs_to_its_split():
    real, digit, known = normal(800, 1), np.arange(800) % 10, {}
    first, second = normal(200, 2), normal(100, 3)
    for features, seed, per_digit in ((first, 0, 20), (second, 0, 20), (first, 1, 20), (second, 0, 10)):
        assert against_real(features, real, digit, seed, per_digit, known) == against_real(features, real, digit, seed, per_digit)
    assert len(known) == 3


def test_images_of_one_digit_are_measured_against_real_ones_of_it():
    digit = np.arange(1200) % 10
    real = normal(1200, 0) + torch.from_numpy(4.0 * digit)[:, None]
    ratios = over_splits(normal(50, 7) + 12, np.full(50, 3), real, digit)
    assert ratios["frechet"]["ratio"] == pytest.approx(1, abs=0.05) and ratios["precision"]["ratio"] == pytest.approx(1, abs=0.05)
    assert ratios["coverage"]["real"] < 0.2  # of all digits
    assert over_splits(normal(19, 7), np.full(19, 3), real, digit) is None


def test_more_images_are_not_measured_against_fewer():
    """Four times as many would cover more of the real ones, and look better."""
    digit, per_digit = np.arange(1200) % 10, np.arange(1000) % 10
    real, fake = normal(1200, 0) + torch.from_numpy(4.0 * digit)[:, None], normal(1000, 3, 0.7) + torch.from_numpy(4.0 * per_digit)[:, None]
    assert over_splits(fake, per_digit, real, digit) == over_splits(fake[:500], per_digit[:500], real, digit)
    assert by_digit(fake, per_digit, real, digit) == by_digit(fake[:500], per_digit[:500], real, digit) != {}


def test_mean_pairwise_distance():
    assert mean_pairwise_distance(torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]])).item() == pytest.approx(10 / 3)
