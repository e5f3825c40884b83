"""Measures of a classifier against closed forms, simulations and the textbook."""

import math

import numpy as np
import pytest
import torch

from p3_clip_textual_inversion import measures


def test_wilson():
    """Newcombe 1998, table I: 81 of 263 is 0.2553 to 0.3662, 1 of 29 is 0.0061 to 0.1718; none and all stay within 0..1."""
    assert measures.wilson(81, 263) == pytest.approx([0.2553, 0.3662], abs=5e-5)
    assert measures.wilson(1, 29) == pytest.approx([0.0061, 0.1718], abs=5e-5)
    assert measures.wilson(0, 5)[0] == 0 and measures.wilson(5, 5)[1] == 1


def test_ranks_and_the_first_guess_agree_on_ties():
    scores = torch.tensor([[0.5, 0.5, 0.1], [0.5, 0.5, 0.1], [0.2, 0.2, 0.2]], dtype=torch.float64)
    order = measures.ranking(scores)
    assert order[:, 0].tolist() == [0, 0, 0]
    assert measures.ranks(order, torch.tensor([0, 1, 2])).tolist() == [1, 2, 3]


def test_a_mean_of_shares_is_the_fraction_that_it_is():
    assert measures.mean([(1, 10), (2, 10), (3, 10)]) == 0.2 != (0.1 + 0.2 + 0.3) / 3
    assert measures.percentiles([0.1 + 0.2] * 3) == [0.3, 0.3]


def test_recalls_are_exact_counts():
    right, truth = torch.tensor([1, 0, 1, 1], dtype=torch.bool), torch.tensor([2, 2, 0, 2])
    assert measures.recalls(right, truth) == {0: (1, 1), 2: (2, 3)}
    low, high = measures.mean_recall_interval({0: (50, 100), 1: (80, 100)})  # sd of the mean: sqrt(.25/100 + .16/100) / 2 = 0.032
    assert low == pytest.approx(0.65 - 1.96 * 0.032, abs=0.005) and high == pytest.approx(0.65 + 1.96 * 0.032, abs=0.005)


def test_two_classifiers_on_the_same_pictures():
    """Agresti's table of approval: 150 and 86 changed; sd of the difference by its formula; small p's by counting."""
    right = torch.zeros(1600, dtype=torch.bool)
    other = right.clone()
    right[:150], other[150:236] = True, True
    result = measures.paired(right, other)
    deviation = math.sqrt(150 + 86 - (150 - 86) ** 2 / 1600) / 1600
    assert result["difference"] == 64 / 1600
    assert result["difference_interval"] == pytest.approx([0.04 - 1.96 * deviation, 0.04 + 1.96 * deviation], abs=1e-3)
    assert measures.mcnemar(150, 86) == pytest.approx(3.7e-5, rel=0.05)
    assert measures.mcnemar(5, 0) == pytest.approx(2 / 32) and measures.mcnemar(3, 3) == measures.mcnemar(0, 0) == 1
    assert measures.paired(right, right)["difference_interval"] == [0, 0]


def test_calibration_error():
    confidence, right = torch.tensor([0.95, 0.95, 0.55, 1.0], dtype=torch.float64), torch.tensor([1, 0, 1, 1], dtype=torch.bool)
    assert measures.reliability(confidence, right, 10) == [(1, 0.55, 1.0), (3, pytest.approx(2.9 / 3), pytest.approx(2 / 3))]
    assert measures.expected_calibration_error(confidence, right, 10) == pytest.approx((0.45 + 0.9) / 4)


def test_the_temperature_is_found_and_makes_confidence_honest():
    """Labels drawn from softmax(logits), which are then made three times too sure."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(4000, 6, generator=generator, dtype=torch.float64)
    truth = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    assert measures.fit_temperature(3 * logits, truth) == pytest.approx(3, rel=0.05)
    fold, temperature = measures.cross_fit_temperature(3 * logits, truth)
    right = logits.argmax(1) == truth
    before, after = (measures.expected_calibration_error(p.softmax(1).amax(1), right) for p in (3 * logits, 3 * logits / temperature[:, None]))
    assert before > 0.2 and after < 0.03
    assert sorted(np.bincount(fold)) == [800] * 5 and all(len(temperature[fold == f].unique()) == 1 for f in range(5))


def test_no_label_has_a_part_in_its_own_temperature():
    generator = torch.Generator().manual_seed(0)
    logits, truth = torch.randn(40, 3, generator=generator, dtype=torch.float64), torch.randint(0, 3, (40,), generator=generator)
    fold, temperature = measures.cross_fit_temperature(logits, truth)
    changed = truth.clone()
    changed[fold == 2] = (changed[fold == 2] + 1) % 3
    again = measures.cross_fit_temperature(logits, changed)[1]
    assert (again == temperature)[fold == 2].all() and (again != temperature)[fold != 2].all()
    assert measures.cross_fit_temperature(logits[:1], truth[:1])[1].tolist() == [1.0]
