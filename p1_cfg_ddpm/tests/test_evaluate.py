import json
import pickle
import shutil
import types

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from p1_cfg_ddpm import classifier, embedding, evaluate, quality
from p1_cfg_ddpm.classifier import CourseClassifier, CourseResNet, DigitClassifier, bundled_classifier, classify, load_classifier
from p1_cfg_ddpm.data import MINI_DATA, Digits, load_digits
from p1_cfg_ddpm.embedding import embed
from p1_cfg_ddpm.evaluate import grade, main, nearest_of, read_folder
from p1_cfg_ddpm.files import UserError
from p1_cfg_ddpm.inference import CHECKPOINT, DrawConfig, all_jobs, generate, load_generator
from p1_cfg_ddpm.model import DOMAINS
from p1_cfg_ddpm.quality import Judges, load_reference

GRADE = "p1_cfg_ddpm.evaluate"


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """OUT with five images a digit and domain, drawn by the bundled model."""
    folder = tmp_path_factory.mktemp("drawn")
    model, diffusion = load_generator(CHECKPOINT, torch.device("cpu"), torch.float32)
    for job, image in generate(model, diffusion, all_jobs(5), DrawConfig(), 100, shown=False):
        (folder / job.domain).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{job.name}.png")
    return folder


@pytest.fixture(scope="session")
def good(drawn):
    """Their scores."""
    return grade(read_folder(drawn)[0])[0]


def test_the_nearest_image_is_found():
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 3), dtype=np.uint8)
    distance, index = nearest_of(images[[7, 3]], images)
    assert index.tolist() == [7, 3] and distance == pytest.approx(0, abs=0.05)
    distance, _ = nearest_of(np.zeros((1, 28, 28, 3), np.uint8), np.full((1, 28, 28, 3), 10, np.uint8))
    assert distance[0] == pytest.approx(10)


def test_copies_of_training_images_would_be_seen(monkeypatch):
    """Ten grey levels beside a training image, where real validation images are forty away: a quarter of their distance."""
    train, digit = np.random.default_rng(0).integers(0, 100, (30, 28, 28, 3), dtype=np.uint8), np.arange(30) % 10
    monkeypatch.setattr(evaluate, "load_digits", lambda _, split, domains: Digits(train + np.uint8({"train": 0, "val": 40}[split]), digit, 0 * digit))
    found = {"mnistm": (train[:20] + np.uint8(10), digit[:20], None)}
    scores, picture = evaluate.nearest_training_images(found, "anywhere")
    assert scores["mnistm"] == {"mean_distance": pytest.approx(10, abs=0.01), "real_mean_distance": pytest.approx(40, abs=0.01),
                                "ratio": pytest.approx(0.25, abs=1e-3), "smallest": pytest.approx(10, abs=0.01)}
    assert picture.size == (10 * 28 * 3, 2 * 28 * 3)


def test_grades_are_counted_by_hand(monkeypatch, capsys):
    """What another classifier reads, in the place of the bundled one; and the digit that is read worst."""
    digit, read = np.array([0, 0, 1, 1, 2]), np.array([0, 1, 1, 1, 0])
    judged = {"images": 5, "accuracy": 1.0, "second_accuracy": 0.2, "accuracy_per_digit": {"0": 1.0, "1": 0.5}, "embedding": None}
    judges = types.SimpleNamespace(scores=lambda *_: (dict(judged), digit), facts={"mnistm": {}, "svhn": {}})
    monkeypatch.setattr(evaluate, "load_classifier", lambda *_: None)
    monkeypatch.setattr(evaluate, "classify", lambda *_: (torch.from_numpy(read), None))
    found = {domain: (np.zeros((5, 28, 28, 3), np.uint8), digit, None) for domain in DOMAINS}
    scores, predictions = grade(found, {"mnistm": "theirs"}, judges=judges)
    assert scores["mnistm"]["accuracy"] == 0.6 and scores["mnistm"]["accuracy_per_digit"] == {"0": 0.5, "1": 1.0, "2": 0.0}
    assert scores["svhn"]["accuracy"] == 1 and scores["mean_accuracy"] == pytest.approx(0.8)
    confusion = np.array(scores["mnistm"]["confusion"])
    assert (confusion[0, 0], confusion[0, 1], confusion[1, 1], confusion[2, 0], confusion.sum()) == (1, 1, 2, 1, 5)
    assert evaluate.share_of_expected(found, predictions) == pytest.approx((3 + 5) / 1000)
    evaluate.print_table(scores)
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:6] == ["mnistm", "5", "60.00%", "2:", "0%", "20.00%"] and lines[3].split()[3:5] == ["1:", "50%"]


def test_judges_count_by_hand(monkeypatch):
    """The first and the second one of each domain, by digit, and the features of each kind beside their own."""
    judges, digit = Judges(), np.repeat(np.arange(10), 3)
    first, second = digit.copy(), digit.copy()
    first[:2], second[:12] = 9, 5
    seen, kinds = [], {"first": torch.zeros(30, 128), "second": None}

    def classify_by(net, images):
        name = "first" if net is judges.first["svhn"] else "second" if net is judges.second["svhn"] else None
        return torch.from_numpy({"first": first, "second": second}[name]), kinds[name]
    monkeypatch.setattr(quality, "classify", classify_by)
    monkeypatch.setattr(quality, "embed", lambda *_: torch.ones(30, 128))
    monkeypatch.setattr(quality, "over_splits", lambda features, digit, real, *_, **__: seen.append((float(features.mean()), real)))
    monkeypatch.setattr(quality, "by_digit", lambda *_: {})
    scores, read = judges.scores("svhn", np.zeros((30, 28, 28, 3), np.uint8), digit)
    assert (scores["accuracy"], scores["second_accuracy"]) == (pytest.approx(28 / 30), pytest.approx(18 / 30)) and (read == first).all()
    assert scores["accuracy_per_digit"] == {"0": pytest.approx(1 / 3)} | {str(d): 1.0 for d in range(1, 10)}
    assert type(judges.first["svhn"]) is not type(judges.second["svhn"])
    reference = judges.reference["svhn"]
    assert [value for value, _ in seen] == [1, 0] and seen[0][1] is reference["embedding"] and seen[1][1] is reference["classifier"]


def test_the_bundled_model_draws_what_it_is_asked_for(good):
    for domain in DOMAINS:
        assert good[domain]["images"] == 50
        assert good[domain]["accuracy"] >= 0.92
        assert 0.6 < good[domain]["pixel_diversity"] < 1.4 and good[domain]["second_accuracy"] >= 0.92
        assert good[domain]["embedding"]["precision"]["ratio"] > 0.8 and good[domain]["embedding"]["coverage"]["ratio"] > 0.4


def test_wrong_images_score_badly(drawn, good, tmp_path):
    """The same images under other digits' names: accuracy falls to nothing and the confusion leaves the diagonal."""
    for domain in DOMAINS:
        (tmp_path / domain).mkdir()
        for path in (drawn / domain).iterdir():
            shutil.copy(path, tmp_path / domain / f"{(int(path.name[0]) + 1) % 10}{path.name[1:]}")
    scores, _ = grade(read_folder(tmp_path)[0])
    assert scores["mean_accuracy"] < 0.1
    noise = {d: (np.random.default_rng(0).integers(0, 256, (50, 28, 28, 3), dtype=np.uint8), np.arange(50) % 10, None) for d in DOMAINS}
    bad = grade(noise)[0]
    for domain in DOMAINS:
        for features in ("embedding", "classifier_features"):
            ours, noisy = good[domain][features], bad[domain][features]
            assert noisy["frechet"]["ratio"] > 3 * ours["frechet"]["ratio"] and noisy["coverage"]["value"] < 0.5 * ours["coverage"]["value"]
    one = {d: (noise[d][0][:1], noise[d][1][:1], None) for d in DOMAINS}
    assert grade(one)[0]["svhn"]["embedding"] is None  # too few to tell


def test_the_bundled_classifiers_and_reference():
    reference, facts = load_reference()
    for domain, lowest in (("mnistm", 0.97), ("svhn", 0.92)):
        assert facts[domain]["accuracy_on_real"] >= lowest and facts[domain]["second_accuracy_on_real"] >= lowest
        assert reference[domain]["embedding"].shape == (2000, 128) and np.bincount(reference[domain]["digit"]).min() > 50
    # on real recipe MNIST-M of other photographs, which no training here has seen
    data = load_digits(MINI_DATA, "train", ("mnistm",))
    for judge in ("classifier", "second"):
        predicted, _ = classify(load_classifier(bundled_classifier("mnistm", judge)), data.images)
        assert (predicted.numpy() == data.digit).mean() >= 0.9
    # an image's features are its own, whatever else is in the batch
    judges, images = Judges(), data.images[:6]
    torch.testing.assert_close(embed(judges.embedding, images)[:2], embed(judges.embedding, images[:2]))


def test_the_command(call, drawn, tmp_path):
    code, out, err = call(GRADE, drawn, "--report", tmp_path / "grade", "--data", MINI_DATA)
    assert code == 0, err
    scores = json.loads((tmp_path / "grade" / "grade.json").read_text())
    assert f"mean accuracy {scores['mean_accuracy']:.2%}" in out and "the grader expects 50 of each" in out
    assert scores["nearest_training_image"]["svhn"]["smallest"] > 5
    assert {path.name for path in (tmp_path / "grade").iterdir()} == {"grade.json", "mistakes.png", "nearest.png"}
    with Image.open(tmp_path / "grade" / "mistakes.png") as image:
        assert image.width > 500
    arrays = {}
    for domain in DOMAINS:
        for split in ("train", "val"):
            data = load_digits(MINI_DATA, split, (domain,))
            arrays |= {f"{domain}_{split}": data.images, f"{domain}_{split}_label": data.digit}
    np.savez(tmp_path / "digits.npz", **arrays)  # the same in one file
    code, out, err = call(GRADE, drawn, "--report", tmp_path / "again", "--data", tmp_path / "digits.npz")
    assert json.loads((tmp_path / "again" / "grade.json").read_text())["nearest_training_image"] == scores["nearest_training_image"], out + err


def test_the_courses_classifier_is_read_safely(call, drawn, tmp_path):
    torch.manual_seed(0)
    model = CourseClassifier()
    path = tmp_path / "Classifier.pth"
    torch.save({"state_dict": model.state_dict(), "optimizer": {"lr": 0.1}}, path)
    images = load_digits(MINI_DATA, "val").images[:8]
    torch.testing.assert_close(classify(load_classifier(path), images)[1], classify(model.eval(), images)[1])
    code, out, err = call(GRADE, drawn, "--report", tmp_path / "grade", "--classifier-mnistm", path, "--data", "/nonexistent")
    assert code == 0 and str(path) in out and "check was skipped" in out, err

    def refused(match):
        with pytest.raises(UserError, match=match) as error:
            load_classifier(path)
        assert "\n" not in str(error.value)

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    path.write_bytes(pickle.dumps({"state_dict": Evil()}))
    refused("cannot be read as a classifier")
    torch.save({"state_dict": Evil()}, path)
    refused("cannot be read as a classifier")
    assert not (tmp_path / "executed").exists()
    torch.save({"weights": 1}, path)
    refused("holds no tensors by name; expected the course's Classifier")
    torch.save({"state_dict": {"conv1.weight": torch.zeros(6, 3, 5, 5)}}, path)
    refused("missing conv1.bias")
    path.write_bytes(b"")
    refused("cannot be read as a classifier")


def test_the_courses_svhn_classifier_is_known_by_its_tensors(tmp_path):
    """A bare state dict of timm's resnet34 with a small stem. An image's answer is its own, whatever else is in the batch: BatchNorm keeps its statistics."""
    torch.manual_seed(0)
    model = CourseResNet()
    names = set(model.net.state_dict())
    assert {"conv1.weight", "bn1.running_mean", "layer1.0.conv1.weight", "layer2.0.downsample.0.weight", "layer4.2.bn2.weight", "fc.bias"} <= names
    assert model.net.conv1.weight.shape == (64, 3, 3, 3) and len(names) == 218 and sum(p.numel() for p in model.parameters()) == 21_282_122
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    torch.save(model.net.state_dict(), tmp_path / "resnet34_svhn.bin")
    torch.save({"state_dict": model.net.state_dict()}, tmp_path / "wrapped.pth")
    images = load_digits(MINI_DATA, "val").images[:4]
    read = load_classifier(tmp_path / "resnet34_svhn.bin")
    assert not any(module.training for module in read.modules())
    predicted, features = classify(read, images)
    assert features.shape == (4, 512)
    torch.testing.assert_close(classify(read, images[:1])[1], features[:1])
    torch.testing.assert_close(classify(model.eval(), images)[1], features)
    torch.testing.assert_close(classify(load_classifier(tmp_path / "wrapped.pth"), images)[1], features)
    with torch.no_grad():  # as the course: ToTensor, mean 0.5, std 0.5, the whole network at once
        assert torch.equal(model.net(torch.from_numpy(images).permute(0, 3, 1, 2) / 255 * 2 - 1).argmax(1), predicted)
    torch.save(dict(model.net.state_dict()) | {"conv1.weight": torch.zeros(64, 3, 7, 7)}, tmp_path / "imagenet.pth")
    with pytest.raises(UserError, match=r"conv1\.weight is \(64, 3, 7, 7\), expected \(64, 3, 3, 3\)"):
        load_classifier(tmp_path / "imagenet.pth")


def test_downloaded_classifiers_of_the_course_judge_unasked(drawn, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "WEIGHTS", tmp_path)
    monkeypatch.setattr("sys.argv", [GRADE, *map(str, (drawn, "--report", tmp_path / "grade", "--data", "/nonexistent"))])
    torch.save({"state_dict": CourseClassifier().state_dict()}, tmp_path / "Classifier.pth")
    main()
    scores = json.loads((tmp_path / "grade" / "grade.json").read_text())
    assert scores["mnistm"]["classifier"] == str(tmp_path / "Classifier.pth") and scores["svhn"]["classifier"] == "bundled"


@pytest.mark.parametrize("spoil, name, message", [
    (lambda out: shutil.rmtree(out / "svhn"), "svhn", "svhn does not exist"),
    (lambda out: [path.unlink() for path in (out / "svhn").iterdir()], "svhn", "has no .png files"),
    (lambda out: (out / "svhn" / "3_001.png").rename(out / "svhn" / "x_001.png"), "svhn/x_001.png", "the name must begin with the digit"),
    (lambda out: (out / "svhn" / "3_001.png").write_bytes(b"no picture"), "svhn/3_001.png", "cannot read the picture"),
    (lambda out: Image.new("RGB", (32, 32)).save(out / "svhn" / "3_001.png"), "svhn/3_001.png", "is 32x32, expected 28x28"),
])  # fmt: skip
def test_what_cannot_be_graded_is_named_and_the_rest_is_graded(drawn, tmp_path, spoil, name, message):
    out = shutil.copytree(drawn, tmp_path / "out")
    spoil(out)
    found, spoiled = read_folder(out)
    assert list(spoiled) == [name] and message in spoiled[name] and "\n" not in spoiled[name]
    assert len(found["mnistm"][0]) == 50 and len(found.get("svhn", [()])[0]) == (0 if name == "svhn" else 49)
    shutil.rmtree(out / "mnistm")
    if name == "svhn":
        with pytest.raises(UserError, match="mnistm does not exist"):
            read_folder(out)


def test_what_is_missing_counts_as_wrong(drawn, tmp_path, monkeypatch, capsys):
    """A folder of one digit that is read right is no whole one; a grade of before does not stand for what cannot be graded."""
    out, report = shutil.copytree(drawn, tmp_path / "out"), tmp_path / "out_grade"
    shutil.rmtree(out / "svhn")
    (out / "mnistm" / "0_001.png").write_bytes(b"")
    monkeypatch.setattr("sys.argv", [GRADE, str(out), "--data", "/nonexistent"])
    main()
    scores, said = json.loads((report / "grade.json").read_text()), capsys.readouterr()
    right = round(scores["mnistm"]["accuracy"] * 49)
    assert not scores["complete"] and scores["accuracy_of_expected"] == pytest.approx(right / 1000) and {*scores["spoiled"]} == {"mnistm/0_001.png", "svhn"}
    assert f"of the 1,000 images that the grader expects {right / 1000:.2%} are right" in said.out and "svhn does not exist" in said.err
    shutil.rmtree(out / "mnistm")
    with pytest.raises(UserError, match="mnistm does not exist"):
        main()
    assert not (report / "grade.json").exists() and json.loads((report / "grade_before.json").read_text()) == scores


def test_half_the_training_data_is_no_error_where_nobody_asked(drawn, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "COURSE_DATA", tmp_path / "digits")
    (tmp_path / "digits" / "mnistm").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", [GRADE, str(drawn), "--report", str(tmp_path / "grade")])
    main()
    assert f"no training images of these domains in {tmp_path / 'digits'}" in capsys.readouterr().out


def test_half_an_image_of_a_killed_run_is_not_read(drawn, tmp_path):
    out = shutil.copytree(drawn, tmp_path / "out")
    (out / "svhn" / ".3_006.png.partx.png").write_bytes(b"half")
    assert len(read_folder(out)[0]["svhn"][0]) == 50


@pytest.mark.parametrize("wrap", [lambda state: state, lambda state: {"model": state},
                                  lambda state: {"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}])
def test_the_courses_classifier_in_wrappings_and_formats(tmp_path, wrap):
    """What a file is, its bytes tell: torch.save's format of either age, or safetensors, under any name."""
    state = CourseClassifier().state_dict()
    for i, write in enumerate((lambda path: torch.save(wrap(state), path), lambda path: torch.save(wrap(state), path, _use_new_zipfile_serialization=False),
                               lambda path: save_file(state, path))):
        for suffix in (".pth", ".safetensors"):
            write(tmp_path / f"{i}{suffix}")
            assert load_classifier(tmp_path / f"{i}{suffix}").conv1.weight.equal(state["conv1.weight"])
    shutil.copyfile(bundled_classifier("svhn"), tmp_path / "ours.pth")
    assert isinstance(load_classifier(tmp_path / "ours.pth"), DigitClassifier)


@pytest.mark.parametrize("module, flags", [(classifier, ["--domain=svhn", "--architecture=plain"]), (embedding, [])])
def test_a_judge_that_is_there_is_not_overwritten(call, tmp_path, monkeypatch, module, flags):
    """By another one; the same command again has nothing to do."""
    digits, path = load_digits(MINI_DATA, "train", ("svhn",)), tmp_path / "judge.safetensors"
    monkeypatch.setattr(module, "load_digits", lambda *_: Digits(*(getattr(digits, name)[:8] for name in ("images", "digit", "domain"))))
    arguments = [module.__name__, *flags, "--data=x", f"--output={path}", "--epochs=1", "--batch-size=4", "--device=cpu", "--dtype=fp32"]
    code, out, err = call(*arguments)
    assert code == 0 and f"wrote {path}" in out, err
    before = path.read_bytes()
    for more, expected, said in (([], 0, ""), (["--seed=1"], 1, f"error: {path} is there, of other settings (seed 0 is now 1), and is not overwritten; ")):
        code, out, err = call(*arguments, *more)
        assert code == expected and err.startswith(said) and "wrote" not in out and path.read_bytes() == before, out + err
    path.write_bytes(b"the user's")
    code, _, err = call(*arguments)
    assert code == 1 and "is not overwritten" in err and path.read_bytes() == b"the user's"
