"""What a classifier says of labelled pictures: classes by rank, probabilities, their calibration; its measures, and the CSV from which they all follow."""

import csv
from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch

from ..data import read_data
from ..files import atomic_path, note
from ..measures import cross_fit_temperature, expected_calibration_error, mean, mean_recall_interval, ranking, ranks, recalls, wilson

TOP = 5
DIGITS = 6  # of a probability, in the CSV and so in everything that is computed of it


@dataclass
class Data:
    """Labelled pictures. numbers, names: of the classes, no two alike; label: a class's row in `texts`, int [classes]; truth: a picture's class, int [N]."""
    paths: list
    numbers: list
    names: list
    texts: list
    label: torch.Tensor
    truth: torch.Tensor


def load_data(folder):
    """The `Data` of a folder in the course's layout. Classes of one name stay two; their captions cannot tell them apart, which is said."""
    paths, classes, labels = read_data(folder)
    numbers, count = list(labels), Counter(labels.values())
    names = [label if count[label] == 1 else f"{label} ({number})" for number, label in labels.items()]
    texts = list(count)
    for text in (text for text in texts if count[text] > 1):
        note(f"{count[text]} classes are called {text!r}; no caption tells them apart, and the first of them is taken")
    return Data(paths, numbers, names, texts, torch.tensor([texts.index(label) for label in labels.values()]),
                torch.tensor([numbers.index(number) for number in classes]))


def cosines_of(features, texts, label):
    """Cosines float64 [N, classes] of pictures and classes. texts: directions [texts, dim]; classes of one text have the same to the last bit."""
    return (features @ texts.T).double()[:, label]


@dataclass
class Outcome:
    """What a classifier says of N pictures. order: classes by rank, int [N, classes]; rank: of the true one, int [N], from 1; probability float64 [N, classes];
    fold and temperature: of each picture's calibration; calibrated: the first guess's probability at that temperature, float64 [N]."""
    order: torch.Tensor
    rank: torch.Tensor
    probability: torch.Tensor
    fold: torch.Tensor
    temperature: torch.Tensor
    calibrated: torch.Tensor

    @property
    def right(self):
        return self.rank == 1

    @property
    def confidence(self):
        return self.probability.gather(1, self.order[:, :1])[:, 0]


def outcome_of(logits, truth, sigmoid=False):
    """The `Outcome` of logits float64 [N, classes]: probabilities by softmax, or each class's own sigmoid, as SigLIP learns; calibrated ones by softmax."""
    order = ranking(logits)
    fold, temperature = cross_fit_temperature(logits, truth)
    probability = (logits.sigmoid() if sigmoid else logits.softmax(1)).round(decimals=DIGITS)
    calibrated = (logits / temperature[:, None]).softmax(1).gather(1, order[:, :1])[:, 0].round(decimals=DIGITS)
    return Outcome(order, ranks(order, truth), probability, fold, temperature, calibrated)


def score(outcome, truth, names):
    """The measures of an `Outcome`, each of which follows from what `write_predictions` writes."""
    right, count = outcome.right, len(truth)
    per_class, top = recalls(right, truth), (outcome.rank <= TOP)
    confused = Counter((names[t], names[p]) for t, p in zip(truth.tolist(), outcome.order[:, 0].tolist()) if t != p)
    hits, top_hits = int(right.sum()), int(top.sum())
    return {
        "top1": hits / count, "top5": top_hits / count, "mean_per_class_recall": mean(per_class.values()),
        "ece": expected_calibration_error(outcome.confidence, right), "ece_calibrated": expected_calibration_error(outcome.calibrated, right),
        "temperature": float(np.mean([outcome.temperature[outcome.fold == f][0] for f in outcome.fold.unique()])),
        "intervals": {"top1": wilson(hits, count), "top5": wilson(top_hits, count), "mean_per_class_recall": mean_recall_interval(per_class)},
        "images": count, "classes": len(names), "per_class": {names[k]: h / n for k, (h, n) in per_class.items()},
        "confused": [{"truth": t, "predicted": p, "count": n} for (t, p), n in confused.most_common(10)],
    }


def write_predictions(path, data, outcome):
    """A CSV with a row per picture: file, class and its rank, the calibration of its first guess, and the five likeliest classes with their probabilities."""
    top = outcome.order[:, :TOP]
    chances = outcome.probability.gather(1, top)
    with atomic_path(path) as temporary, open(temporary, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["file", "class_id", "label", "rank", "fold", "temperature", "calibrated",
                         *(f"{what}_{i + 1}" for i in range(top.shape[1]) for what in ("predicted", "probability"))])
        for i, file_path in enumerate(data.paths):
            guesses = [part for k, p in zip(top[i].tolist(), chances[i].tolist()) for part in (data.names[k], f"{p:.{DIGITS}f}")]
            truth = data.truth[i]
            writer.writerow([file_path.name, data.numbers[truth], data.names[truth], outcome.rank[i].item(), outcome.fold[i].item(),
                             repr(outcome.temperature[i].item()), f"{outcome.calibrated[i].item():.{DIGITS}f}", *guesses])
