"""Digit classifiers for grading: the course's own two (`Classifier.pth`, `resnet34_svhn`) and a small one per domain that is trained here.

    python -m p1_cfg_ddpm.classifier --domain svhn --data hw2_data/digits      # writes runs/classifier_svhn.safetensors
"""

import argparse
import json
import math
import os
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from .data import load_digits
from .device import autocast, describe, name_of, pick_device, pick_dtype, progress, use_tf32
from .files import ROOT, UserError, check_flags, existing_file, run, writable_file
from .model import BUNDLED, DOMAINS, NUM_DIGITS
from .pictures import to_model
from .provenance import HelpFormatter, differences
from .state import data_fingerprint
from .tensors import fill, find_state_dict, load_weights, read_safetensors, read_tensors, save_weights, what_is

WEIGHTS = ROOT / "hw2_data" / "weights"  # where scripts/download_weights.sh puts what it fetches, the course's own classifiers under these names
COURSE_FILES = {"mnistm": "Classifier.pth", "svhn": "resnet34_svhn.bin"}
COURSE_NAMES = ("conv1.weight", "conv2.weight", "fc1.weight", "fc3.bias", "layer1.0.conv1.weight", "bn1.weight", "fc.weight")  # some of its tensors'
EXPECTED = "the course's Classifier.pth or resnet34_svhn, or a .safetensors of p1_cfg_ddpm.classifier"


class DigitClassifier(nn.Module):
    """A residual network of 0.8 M parameters. Images [B, 3, 28, 28] in [-1, 1] -> logits [B, 10]."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.stages = nn.Sequential(Downsample(32, 64), Residual(64), Residual(64), Downsample(64, 128), Residual(128), Residual(128))
        self.norm = nn.GroupNorm(8, 128)
        self.head = nn.Linear(128, NUM_DIGITS)

    def features(self, x):
        """The pooled activations before the last layer, [B, 128]."""
        return F.silu(self.norm(self.stages(self.stem(x)))).mean(dim=(2, 3))

    def logits(self, features):
        """[B, 128] -> [B, 10]"""
        return self.head(features)

    def forward(self, x):
        return self.logits(self.features(x))


class Residual(nn.Sequential):
    def __init__(self, channels):
        super().__init__(nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1),
                         nn.GroupNorm(8, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x):
        return x + super().forward(x)


class Downsample(nn.Sequential):
    def __init__(self, in_channels, out_channels):
        super().__init__(nn.GroupNorm(8, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1))


class SecondClassifier(nn.Module):
    """The second judge: plain convolutions with BatchNorm and pooling by maxima (Simonyan and Zisserman 2015), another kind of network than the one
    above, trained from another seed. Nothing is chosen by it: it says whether what was chosen by the first pleases the first alone. Same interface."""

    def __init__(self):
        super().__init__()
        layers, channels = [], 3
        for width in (64, 128, 192):
            for _ in range(2):
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers += [nn.MaxPool2d(2), nn.Dropout2d(0.1)]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(192, NUM_DIGITS)

    def features(self, x):
        """The largest activation of each channel before the last layer, [B, 192]."""
        return self.layers(x).amax(dim=(2, 3))

    def logits(self, features):
        """[B, 192] -> [B, 10]"""
        return self.head(features)

    def forward(self, x):
        return self.logits(self.features(x))


ARCHITECTURES = {"residual": DigitClassifier, "plain": SecondClassifier}


class CourseClassifier(nn.Module):
    """The course's MNIST-M grader: two convolutions with max-pooling, three linear layers. Same interface as above."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(256, 128)
        self.fc2 = nn.Linear(128, 64)
        self.fc3 = nn.Linear(64, NUM_DIGITS)

    def features(self, x):
        """The activations before the last layer, [B, 64]."""
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        return F.relu(self.fc2(F.relu(self.fc1(x))))

    def logits(self, features):
        """[B, 64] -> [B, 10]"""
        return self.fc3(features)

    def forward(self, x):
        return self.logits(self.features(x))


class CourseResNet(nn.Module):
    """The course's SVHN grader: timm's resnet34 as `edadaltocg/resnet34_svhn` on the hub has it for small pictures, a 3x3 stem of stride 1 and no
    max-pooling. Its BatchNorm layers keep their running statistics: in training mode a digit would depend on its batch. Same interface as above, and the
    course's mean and deviation of 0.5, not SVHN's, which its card names."""

    def __init__(self):
        super().__init__()
        import timm  # takes a second, which only this grader needs

        self.net = timm.create_model("resnet34", num_classes=NUM_DIGITS)
        self.net.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        self.net.maxpool = nn.Identity()

    def features(self, x):
        """The pooled activations before the last layer, [B, 512]."""
        return self.net.forward_head(self.net.forward_features(x), pre_logits=True)

    def logits(self, features):
        """[B, 512] -> [B, 10]"""
        return self.net.fc(features)

    def forward(self, x):
        return self.logits(self.features(x))


def load_classifier(path, device="cpu"):
    """A classifier from a file, whatever its name: ours, or one of the course's two, known by its tensors: a state dict, or a dictionary with one under
    `state_dict`, `model`, ..., read safely."""
    path = existing_file(path, "classifier")
    content = read_tensors(path, "classifier", EXPECTED)
    if what_is(path)[0] == "safetensors" and "config" in read_safetensors(path)[1]:
        tensors, facts = load_weights(path)
        architecture = facts.get("architecture", "residual") if isinstance(facts, dict) else None
        if architecture not in ARCHITECTURES:
            raise UserError(f"{path} is a classifier of an unknown architecture {architecture!r}; known are {', '.join(ARCHITECTURES)}")
        model = fill(ARCHITECTURES[architecture](), tensors, path)
    else:
        state_dict, _ = find_state_dict(content, path, COURSE_NAMES, EXPECTED)
        model = CourseResNet() if "layer1.0.conv1.weight" in state_dict else CourseClassifier()
        fill(model.net if isinstance(model, CourseResNet) else model, state_dict, path)
    return model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def bundled_classifier(domain, judge="classifier"):
    """The file of the bundled judge of a domain; judge: "classifier" or "second"."""
    return BUNDLED / f"{judge}_{domain}.safetensors"


def course_classifier(domain):
    """The file of the course's own classifier, where it has been downloaded; otherwise None."""
    path = WEIGHTS / COURSE_FILES[domain]
    return path if path.is_file() else None


@torch.inference_mode()
def classify(model, images, batch_size=500):
    """images: uint8 numpy [N, 28, 28, 3] -> (predicted digits int64 [N], features float64 [N, F]), on the CPU."""
    device = next(model.parameters()).device
    features = torch.cat([model.features(to_model(images[i:i + batch_size], device)) for i in range(0, len(images), batch_size)])
    return model.logits(features).argmax(dim=1).cpu(), features.cpu().double()


def augment(x, generator, strength=1.0):
    """Small random rotation, scale and shift, contrast and brightness per colour channel. x: [B, 3, 28, 28] in [-1, 1]."""
    def uniform(low, high, *shape):
        middle, reach = (low + high) / 2, strength * (high - low)
        return (torch.rand(len(x), *shape, generator=generator).to(x.device) - 0.5) * reach + middle

    angle, scale = uniform(-0.2, 0.2), uniform(0.85, 1.15)
    cos, sin = angle.cos() / scale, angle.sin() / scale
    affine = torch.stack([torch.stack([cos, -sin, uniform(-0.15, 0.15)], 1), torch.stack([sin, cos, uniform(-0.15, 0.15)], 1)], 1)
    x = F.grid_sample(x, F.affine_grid(affine, x.shape, align_corners=False), padding_mode="reflection", align_corners=False)
    return (x * uniform(0.6, 1.4, 3, 1, 1) + uniform(-0.3, 0.3, 3, 1, 1)).clamp(-1, 1)


def train_in_one_cycle(parameters, loss_of, num_images, args, weight_decay, generator, device, what):
    """AdamW with one cycle of the learning rate (Smith 2018), over --epochs of --batch-size images. loss_of(index): of these images, int [B] on the device.
    Returns the last loss."""
    optimizer = torch.optim.AdamW(parameters, weight_decay=weight_decay)
    batches = max(num_images // args.batch_size, 1)
    cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.epochs * batches)
    bar = progress(total=args.epochs * batches, unit="step", desc=what)
    for _ in range(args.epochs):
        order = torch.randperm(num_images, generator=generator).to(device)
        for i in range(batches):
            loss = loss_of(order[i * args.batch_size:(i + 1) * args.batch_size])
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            cycle.step()
            bar.update()
            if i % 20 == 0:
                bar.set_postfix_str(f"loss {loss.item():.3f}")
    bar.close()
    if not math.isfinite(loss.item()):
        raise UserError("the loss is not finite; try a smaller --lr, or --dtype fp32")
    return loss.item()


def is_there(output, settings):
    """Whether the file is the result of a training of these settings already. A `UserError` where it is anything else, which is not overwritten."""
    if not os.path.lexists(output):
        return False
    try:
        facts = load_weights(output)[1]
    except UserError:
        facts = None
    before = facts if isinstance(facts, dict) else {}
    changed = differences({name: before.get(name) for name in settings}, settings)
    if changed:
        raise UserError(f"{output} is there, of other settings ({'; '.join(changed)}), and is not overwritten; choose another --output, or move it away")
    print(f"{output} is there already, of these settings")
    return True


def add_training_arguments(parser, epochs, batch_size, lr):
    """The flags of a training in one cycle. epochs, batch_size, lr: their defaults."""
    parser.add_argument("--epochs", type=int, default=epochs, help="over all images")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images per step")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate of AdamW, one cycle")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--dtype", choices=["auto", "fp32", "bf16"], default="auto", help="autocast format; auto: bf16 where it is native")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")


def check_training_arguments(args):
    """(device, dtype) of parsed arguments, checked."""
    check_flags(args, ("epochs", "batch_size"), lambda value: value >= 1, "at least 1")
    check_flags(args, ("lr",), lambda value: 0 <= value < math.inf, "a number from 0")
    check_flags(args, ("seed",), lambda value: -10**12 < value < 10**12, "a whole number of at most 12 digits")
    device = pick_device(args.device)
    dtype = pick_dtype(args.dtype, device, among=("bf16",))
    use_tf32(True)
    return device, dtype


def main():
    parser = argparse.ArgumentParser(description="Trains the small classifier of one domain.", formatter_class=HelpFormatter)
    parser.add_argument("--domain", choices=DOMAINS, required=True, help="whose digits")
    parser.add_argument("--architecture", choices=list(ARCHITECTURES), default="residual", help="plain: the second judge")
    parser.add_argument("--data", type=Path, required=True, help="folder with mnistm/ and svhn/ in the course's layout")
    parser.add_argument("--output", type=Path, default=None, help="the file to write (default: runs/classifier_{domain}.safetensors)")
    add_training_arguments(parser, epochs=8, batch_size=128, lr=3e-3)
    args = parser.parse_args()
    device, dtype = check_training_arguments(args)
    output = writable_file(args.output or Path("runs") / f"classifier_{args.domain}.safetensors")
    train, val = (load_digits(args.data, split, (args.domain,)) for split in ("train", "val"))
    settings = {"domain": args.domain, "architecture": args.architecture, "train_images": len(train), "val_images": len(val), "epochs": args.epochs,
                "batch_size": args.batch_size, "lr": args.lr, "seed": args.seed, "dtype": name_of(dtype),
                "pictures": data_fingerprint(train.images, train.digit, val.images, val.digit)}
    if is_there(output, settings):
        return
    images, digit = torch.from_numpy(train.images).to(device), torch.from_numpy(train.digit).to(device)

    print(f"{args.architecture} classifier of {args.domain}, {len(train)} images from {args.data}, on {describe(device, dtype)}", flush=True)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    model = ARCHITECTURES[args.architecture]().to(device, memory_format=torch.channels_last)

    def loss_of(index):
        x = augment(to_model(images[index]), generator).contiguous(memory_format=torch.channels_last)
        with autocast(device, dtype):
            logits = model(x)
        return F.cross_entropy(logits.float(), digit[index], label_smoothing=0.05)

    train_in_one_cycle(list(model.parameters()), loss_of, len(train), args, 0.05, generator, device, f"classifier {args.domain}")
    correct = classify(model.eval().float(), val.images)[0].numpy() == val.digit
    facts = settings | {"val_accuracy": float(correct.mean())}
    save_weights(output, model.half().state_dict(), facts)
    print(f"wrote {output}: {json.dumps(facts)}")


if __name__ == "__main__":
    run(main)
