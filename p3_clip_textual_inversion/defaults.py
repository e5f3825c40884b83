"""A row of settings for each model, with the source of each number; a command's flags override them.

Which row a model gets is decided by what it is (`row_of`), not by where it lies. The miniature's numbers were measured on it and say nothing of the real
model; those of Stable Diffusion are the published ones named beside them, or follow from the time and memory that a drawing has (scripts/hw2_3.sh).
"""

from dataclasses import dataclass
from pathlib import Path

from .files import ROOT, UserError

DATA = ROOT / "hw2_data"
WEIGHTS = DATA / "weights"  # where scripts/download_weights.sh puts what it fetches


@dataclass(frozen=True)
class Drawing:
    """batch_size: pictures at a time."""
    sampler: str
    steps: int
    guidance_weight: float  # w of eps = (1+w) eps_cond - w eps_uncond; the guidance scale of diffusers is 1 + w
    batch_size: int


@dataclass(frozen=True)
class Learning:
    """Textual inversion; the last two are of Custom Diffusion, whose key and value projections learn too."""
    steps: int
    batch_size: int
    lr: float
    vectors: int
    min_snr_gamma: float
    style_pull: float  # of a style's word, for a whole run: the share of the way back to the initial words
    lr_projections: float
    prior: int  # ordinary pictures


@dataclass(frozen=True)
class Custom:
    """Custom Diffusion, where it differs from `Learning`."""
    steps: int
    batch_size: int
    lr: float
    min_snr_gamma: float
    pull: float


@dataclass(frozen=True)
class LowRank:
    """LoRA with pivotal tuning, where it differs from `Learning`."""
    lora: int  # the rank
    steps: int
    lr_lora: float
    pivot: float  # share of the steps in which the word learns alone
    hold: float  # share of what ordinary captions say that the weights do not hear; 0: they hear all
    prior_waits: int  # 1: ordinary pictures come when the weights begin to learn; before, no gradient comes of them, but the word sees fewer of its own


@dataclass(frozen=True)
class Several:
    """The comparison of ways to bring several concepts into one picture. runs: {name: (steps per concept, flags of train)}; moved: the things by which it is
    seen how far ordinary prompts move, none that a prior is drawn of."""
    input: Path
    ordinary: str  # the thing beside the first subject
    ordinary_pictures: Path
    other_styles: tuple
    runs: dict
    moved: tuple


@dataclass(frozen=True)
class Defaults:
    key: str  # begins the name of the folder of its installed words
    name: str
    side: int  # of its pictures, in pixels
    medium: str  # what its pictures are called in captions
    input: Path  # the concepts to learn and to draw
    templates: dict  # {"object" or "style": captions to learn with, the last of which is the plainest, for samples and ordinary pictures}
    ordinary: tuple  # things that a prior is drawn of, none that a prompt has
    drawing: Drawing
    learning: Learning
    custom: Custom
    low_rank: LowRank
    several: Several
    judge: str  # the CLIP that grades its pictures
    judge_weights: str | None = None


MINIATURE = Defaults(
    key="miniature", name="the miniature", side=64, medium="drawing", input=DATA / "mini" / "textual_inversion" / "input.json",
    templates={"object": ("a {}", "a drawing of a {}"), "style": ("a drawing in the style of {}", "a drawing of a thing in the style of {}")},
    ordinary=("cat face", "bus", "tulip", "rose", "guitar", "snowman", "key", "fox"),
    drawing=Drawing(
        sampler="dpmpp_2m", steps=25, batch_size=8,
        guidance_weight=3.0),  # measured: miniature.scores, on the first of the trainings
    learning=Learning(
        steps=300, batch_size=16, lr=5e-3,  # measured on three instances (miniature.words --seed 1), of the way: 150 steps at 1e-3, gamma 0.1: 0.56,
        # at 5e-3 0.63; 300 at 1e-2 0.57; these 0.68, and the best words 0.79
        vectors=4,  # as with the miniature's forerunner
        min_snr_gamma=0.5,  # measured, likewise: what it draws is decided under more noise than a loss that weighs all noise alike listens to
        style_pull=0.3,  # measured on two styles, of the way from the initial words: 0.55 goes 0.04, 0.3 0.38, 0 0.15 (lr 3e-3, gamma 0.1, 150 steps)
        lr_projections=1e-4, prior=48),
    custom=Custom(steps=500, batch_size=8, lr=3e-3, min_snr_gamma=5.0, pull=0.0),  # measured by its forerunner
    low_rank=LowRank(  # measured on a penguin: on an earlier miniature, where three seeds of these went 0.85 to 0.91 of the way; on this one
        lora=8, steps=400, lr_lora=4e-3, pivot=0.3, hold=0.9999, prior_waits=0),  # 0.86, 0.85, ordinary prompts move by 2.8 grey levels
    # (p3_words.json, p3_lora.json); where ordinary pictures wait, 0.74
    several=Several(
        input=DATA / "mini" / "textual_inversion" / "several.json", ordinary="red apple", ordinary_pictures=DATA / "mini" / "clip_zeroshot",
        other_styles=("twemoji", "openmoji", "fluent emoji flat", "emojione", "noto v1"),
        runs={  # measured by its forerunner; gently where more learns, or for longer
            "apart": (300, ()),  # as p3_train.sh does by itself
            "together": (300, ("--joint",)),
            "custom": (300, ("--joint", "--custom-diffusion", "--lr=3e-3", "--lr-projections=3e-4", "--batch-size=8", "--min-snr-gamma=5", "--pull=0")),
            "custom_apart": (500, ("--custom-diffusion", "--lr=3e-3", "--batch-size=8", "--min-snr-gamma=5", "--pull=0")),
            "lora_apart": (400, ("--lora", "--prior-waits=1"))},  # as the real model's learn
        moved=("lion", "airplane", "pear", "castle", "bicycle", "camera", "crab", "mushroom")),
    judge=str(DATA / "mini" / "clip"))

SD_V1 = Defaults(
    key="sd_v1", name="Stable Diffusion v1", side=512, medium="photo", input=DATA / "textual_inversion" / "input.json",
    templates={  # of Gal et al. 2023, whose list diffusers' example has
        "object": ("a rendering of a {}", "a cropped photo of the {}", "the photo of a {}", "a photo of a clean {}", "a photo of my {}",
                   "a close-up photo of a {}", "a bright photo of the {}", "a good photo of the {}", "a photo of one {}", "a photo of a {}"),
        "style": ("a rendering in the style of {}", "a picture in the style of {}", "a cropped painting in the style of {}",
                  "a close-up painting in the style of {}", "a nice painting in the style of {}", "a painting in the style of {}")},
    ordinary=("person", "horse", "car", "house", "tree", "bowl", "chair", "street"),
    drawing=Drawing(
        sampler="dpmpp_2m", steps=15,  # Lu et al. 2022: guided samples of high quality in 15 to 20 steps; 15 keep a hundred pictures within five minutes
        guidance_weight=6.5,  # diffusers' scale of 7.5, which the published models are shown with
        batch_size=4),  # which 11 GB hold in fp32, too
    learning=Learning(
        steps=3000, batch_size=4,  # diffusers' example of textual inversion: 3,000 steps of four pictures
        lr=2e-3,  # likewise: 5e-4 for each of the four (--scale_lr), 14 % of a token's ordinary number a step; of the miniature's, 12 % were best
        vectors=0,  # one for each token of the initial words: of one, one (Gal et al. 2023: more fit the pictures better and the rest of the prompt worse);
        # "David Revoy", of three, begins as what the model knows by it, and not as the mean of a first name and two syllables
        min_snr_gamma=5.0,  # Hang et al. 2023
        style_pull=0.0,  # published trainings have none
        lr_projections=4e-5,  # Kumari et al. 2023: 1e-5 for each picture of the batch
        prior=200),  # Kumari et al. 2023
    custom=Custom(
        steps=500, batch_size=4,  # Kumari et al. 2023: 250 steps of eight pictures; at 4 they fit into 11 GB. Ordinary pictures are half of these here
        lr=4e-5,  # likewise: 1e-5 for each picture of the batch, of the word as of the projections
        min_snr_gamma=5.0, pull=0.0),
    low_rank=LowRank(
        steps=2000, pivot=0.5,  # lora-diffusion's examples of pivotal tuning (Ryu 2022): 1,000 steps for the word, 1,000 for the weights
        lora=4, lr_lora=4e-4,  # likewise 1e-4 for each of four pictures (--scale_lr); their rank is 1 to 4, of more layers
        hold=0.0,  # published trainings have none
        prior_waits=1),  # likewise: there the word learns by its own pictures alone
    several=Several(
        input=DATA / "textual_inversion" / "input.json", ordinary="cat", ordinary_pictures=DATA / "clip_zeroshot",
        other_styles=("a photograph", "a pencil drawing", "a cartoon", "Vincent van Gogh", "pixel art"),
        runs={  # words as above; Kumari et al. 2023: 250 steps of eight pictures a concept, words and projections at 1e-5 for each picture of the batch
            "apart": (3000, ()), "together": (3000, ("--joint",)),
            "custom": (500, ("--joint", "--custom-diffusion", "--lr=4e-5")), "custom_apart": (500, ("--custom-diffusion", "--lr=4e-5")),
            "lora_apart": (2000, ("--lora",))},
        moved=("airplane", "pizza", "guitar", "mountain", "teapot", "elephant", "bridge", "flower")),
    judge="ViT-B-32-quickgelu", judge_weights="openai")  # the course's grader

ROWS = (MINIATURE, SD_V1)


def row_of(side):
    """The `Defaults` of a model by the side of its pictures, in pixels, or of pictures by theirs: a miniature draws thumbnails, of less than 256 pixels."""
    return MINIATURE if side < 256 else SD_V1


def input_of(path, own):
    """The concepts' file: the one that was given or, without one, the model's own, which the real model's users download."""
    if path is None and not own.is_file():
        raise UserError(f"{own} is not there: bash scripts/download_data.sh fetches it; or give another file of concepts")
    return path or own


def report_of(given, input, own, checkpoint, bundled, beside):
    """The folder of a measurement's results: the one that is given; the report's, where it was the bundled model with its own concepts;
    otherwise one beside what was measured."""
    its_own = Path(checkpoint).resolve() == bundled.resolve() and Path(input).resolve() == own.resolve()
    return given or (ROOT / "report" if its_own else Path(beside) / "report")


def of_model(group, name):
    """"(default: ...)", as --help tells a default that is the model's: what each row of the table has of that name in a group."""
    return "(default: " + ", ".join(f"{row.name} {getattr(getattr(row, group), name)}" for row in ROWS) + ")"


def add_argument(parser, group, flag, help, **options):
    """Adds a flag whose default is the model's, which `fill_in` puts in."""
    parser.add_argument(flag, default=None, help=f"{help} {of_model(group, flag.strip('-').replace('-', '_'))}", **options)


def fill_in(args, group):
    """Gives parsed arguments the values of a row's group that no flag has set (which are None). Returns a line that tells all of the group that are numbers
    or names."""
    given = {name for name in vars(group) if getattr(args, name, None) is not None}
    vars(args).update((name, value) for name, value in vars(group).items() if name not in given)
    return ", ".join(f"{name.replace('_', '-')} {getattr(args, name)}{' (by flag)' if name in given else ''}"
                     for name, value in vars(group).items() if isinstance(value, (int, float, str)))
