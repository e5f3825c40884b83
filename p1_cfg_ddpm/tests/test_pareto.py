"""How the default is chosen: by all seeds, told on others, and no row measured twice; the digits are not drawn."""

import json
import sys
from dataclasses import replace

import pytest

from p1_cfg_ddpm import pareto
from p1_cfg_ddpm.diffusion import Diffusion
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.inference import DrawConfig
from p1_cfg_ddpm.pictures import chart


def test_guided_steps_ask_the_network_twice():
    settings = ((4, (0, 1)), (0, (0, 1)), (4, (0, 0)), (4, (0, 0.5)))
    count = [pareto.evaluations(DrawConfig(guidance_weight=w, guidance_interval=i), Diffusion()) for w, i in settings]
    assert count[:3] == [12, 6, 6] and 6 < count[3] < 12


@pytest.fixture
def drawn(monkeypatch, tmp_path, tiny_checkpoint):
    """Runs the command with measures by a rule: w 4 is right on every seed but 3, w 6 on all; further from real images the larger w. Returns the calls."""
    calls = []

    def measure(model, diffusion, config, images_per_digit, batch_size, judges, guide=None):
        calls.append((config.guidance_weight, config.seed))
        right = 0.9 if (config.guidance_weight, config.seed) == (4.0, 3) else 1.0
        scores = {"accuracy": right, "second_accuracy": 1.0, "accuracy_per_digit": {"0": right}, "precision": 1.0, "coverage": 1.0,
                  "frechet": config.guidance_weight}
        return {**{name: getattr(config, name) for name in DrawConfig.__dataclass_fields__}, **dict.fromkeys(pareto.DOMAINS, scores)}

    monkeypatch.setattr(pareto, "measure", measure)
    monkeypatch.setattr(pareto, "DEFAULT", replace(pareto.DEFAULT, guidance_parallel=(1.0, 1.0)))  # a point of the grid below
    monkeypatch.setattr(pareto, "show", lambda row: None)
    monkeypatch.setattr(pareto, "Judges", lambda device: None)
    monkeypatch.setattr(pareto, "GRID", [(6, w, (0.0, 1.0)) for w in (4.0, 6.0, 8.0)])
    monkeypatch.setattr(pareto, "PARALLELS", [(6, 9.0, (1.0, 0.0))])
    monkeypatch.setattr(sys, "argv", ["pareto", "--checkpoint", str(tiny_checkpoint), "--output", str(tmp_path / "p.json"), "--finalists", "2"])
    return calls


def test_all_seeds_choose_and_others_tell(drawn, tmp_path):
    pareto.main()
    results = json.loads((tmp_path / "p.json").read_text())
    assert results["chosen"]["guidance_weight"] == 6.0 and results["chosen"]["seeds"] == [0, 1, 2, 3, 4]  # w 4 was better on the first seed alone
    assert [told["seeds"] for told in results["fresh"]] == [[5, 6, 7, 8, 9]] * 2
    assert {(8.0, 0), (9.0, 0)} <= set(drawn) and not {(8.0, 1), (9.0, 1)} & set(drawn)
    count = len(drawn)
    pareto.main()
    assert len(drawn) == count == len(set(drawn))
    assert chart(pareto.panels(results), tmp_path / "p.png").stat().st_size > 10_000


def test_seeds_that_choose_do_not_tell(drawn, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--fresh", "4", "5"])
    with pytest.raises(UserError, match="other seeds"):
        pareto.main()
