"""Is a concept in a picture? CLIP's answer, by a threshold or by captions, and how often it is right on real pictures that set nothing."""

import torch
from PIL import Image, ImageOps

from ..concepts import kind_of
from ..data import example_pictures


def half_crops(picture):
    """The left and right of a picture, squares of 0.55 of its side at mid-height, where a subject of two stands."""
    side = round(0.55 * min(picture.size))
    top = (picture.height - side) // 2
    return [picture.crop((left, top, left + side, top + side)) for left in (0, picture.width - side)]


def halves_and_whole(pictures):
    """Three for each picture, in turn."""
    return [crop for picture in pictures for crop in (*half_crops(picture), picture)]


class Finder:
    """Whether CLIP finds a concept in a picture: its image score against examples of the concept, in the better of both halves and the whole, above a
    threshold: the middle between the mean scores of real pictures with the concept and of real pictures without it."""

    def __init__(self, grader, references, present, absent):
        self.grader, self.references = grader, grader.of_pictures(references)
        self.threshold = (self.scores(present).mean() + self.scores(absent).mean()).item() / 2

    def scores(self, pictures):
        """[N]"""
        crops = halves_and_whole(pictures)
        return 100 * (self.grader.of_pictures(crops) @ self.references.T).mean(1).reshape(-1, 3).amax(1)

    def __call__(self, pictures):
        """bool [N]"""
        return self.scores(pictures) > self.threshold


class CaptionFinder:
    """The same by captions: CLIP takes the picture, or one of its halves, for the first of several captions rather than for the others."""

    def __init__(self, grader, captions, halves=True):
        self.grader, self.halves, self.directions = grader, halves, grader.of_texts(captions)

    def __call__(self, pictures):
        crops = halves_and_whole(pictures) if self.halves else pictures
        return ((self.grader.of_pictures(crops) @ self.directions.T).argmax(1) == 0).reshape(len(pictures), -1).any(1)


PLACES = ((0, 0.5), (1, 0.5), (0.5, 0), (0.5, 1))  # left, right, above, below: of a crop's free room, the share before it
OPPOSITE = ((0, 1), (1, 0), (2, 3), (3, 2))


def places(picture):
    """The four squares of 0.55 of its side in which a subject of two may stand."""
    side = round(0.55 * min(picture.size))
    corners = [(round(x * (picture.width - side)), round(y * (picture.height - side))) for x, y in PLACES]
    return [picture.crop((left, top, left + side, top + side)) for left, top in corners]


def in_company(pairs):
    """(views of the first ones, views of the second ones) of pairs of pictures: beside and above each other in both orders, cut out of their `places`."""
    views = [], []
    for pair in pairs:
        for upright, (near, far) in ((False, (0, 1)), (True, (2, 3))):
            for order in ((0, 1), (1, 0)):
                crops = places(beside(*(pair[i] for i in order), upright=upright))
                for i, place in zip(order, (near, far)):
                    views[i].append(crops[place])
    return views


class BothFinder:
    """Whether two concepts are both in a picture, each in a place of its own.

    What a crop is compared with are views, each cut out of a composition, as what is judged will be: of A's and B's examples together, of see-through
    mixtures of both and of chimeras, half of each, beside whole ones. Features f are centred on other things' mean and whitened by how views of one thing
    differ (as in linear discriminant analysis), so that ground, neighbour and place count for less:

        W (f - mean of other things),   W' W = (S + tr(S)/dim I)^-1,   S the covariance of A's and of B's views around their means

    Of a crop, z(A) is the mean cosine to the `NEAREST` of A's views, in deviations above its cosines to other things. In two opposite places stand A and B
    where in each z is large, larger than the other concept's, less `NEAR`, and than that of mixtures. The score is the least of these, in the best of the
    places: unlike two scores of one concept each, a thing between A and B does not get it.

    first, second: example pictures; others: features [K, dim] of other things, each of length up to 1."""

    NEAREST = 5  # views; it and the next are chosen on half the classes of the miniature's labelled pictures, and tried on the others by both.py
    NEAR, BLENDED, HALVED = 1.5, 2.0, 1.75  # deviations

    def __init__(self, grader, first, second, others):
        self.grader = grader
        pairs = [(a, b) for part in (second, [*second[1:], *second[:1]]) for a, b in zip(first, part)]
        see_through = [blend(a, b) for a, b in zip(first, second)]
        half_of_each = [half for a, b in zip(first, second) for half in (chimera(a, b), chimera(b, a))]
        whole = [picture for pair in zip(first, second) for picture in pair]
        mixed = in_company([*zip(see_through, first), *zip(see_through, second)])[0]
        halved = [*in_company(zip(half_of_each, whole))[0], *(view for half in half_of_each for view in places(half)[:2])]
        views = [self.features(group) for group in (*in_company(pairs), mixed, halved)]
        around = torch.cat([own - own.mean(0) for own in views[:2]])
        spread = around.T @ around / len(around)
        spread += spread.diagonal().mean() * torch.eye(len(spread))
        self.middle, self.whiten = others.mean(0), torch.linalg.inv(torch.linalg.cholesky(spread)).T
        self.views, self.others = [self.whitened(group) for group in views], self.whitened(others)

    def features(self, pictures):
        """[N, dim]: of a picture and its mirror image together, which halves what is chance."""
        return (self.grader.of_pictures(pictures) + self.grader.of_pictures([ImageOps.mirror(picture) for picture in pictures])) / 2

    def whitened(self, features):
        """[N, dim], of length 1"""
        return torch.nn.functional.normalize((features - self.middle) @ self.whiten, dim=-1)

    def scores(self, pictures):
        """[N]"""
        features = self.whitened(self.features([crop for picture in pictures for crop in places(picture)]))
        own = torch.stack([(features @ views.T).topk(min(self.NEAREST, len(views)), 1).values.mean(1) for views in self.views], 1)
        others = features @ self.others.T
        z = (own - others.mean(1, keepdim=True)) / others.std(1, keepdim=True)
        a, b, mixed, halved = z.reshape(len(pictures), len(PLACES), 4).unbind(-1)
        between = torch.maximum(mixed - self.BLENDED, halved - self.HALVED)
        found = [torch.stack([own, own - other + self.NEAR, own - between]).amin(0) for own, other in ((a, b), (b, a))]
        return torch.stack([torch.minimum(found[0][:, i], found[1][:, j]) for i, j in OPPOSITE]).amax(0)


def make_finders(grader, concepts, folder, row, others, ordinary, labels, side):
    """({key: finder}, {key: how many real pictures that set no threshold it judges rightly}).

    folder: of the concepts' folders of examples; row: the model's `Defaults`; others: ordinary pictures; ordinary: the name of the thing that "ordinary"
    finds, among the names `labels`; side: of the pictures that will be judged, which real ones of two things are made as large as.

    A concept's two most typical examples are kept from its references: with one the threshold is set, with the other the finder is tried; likewise the two
    halves of the ordinary pictures. (One that shows it small, in company, says little of how it looks at half size.) A subject is seen beside another thing.
    Where a folder of the name 0+1 holds real pictures of subject 0 in style 1, there are two finders for these: "0 in 1", told from other things in the
    style, and "1 on 0", by captions that name styles (CLIP's image score, which looks for subjects, does not tell a style on a subject that is not among its
    examples)."""
    finders, validation = {}, {}
    examples = {concept.number: most_typical_last(grader, example_pictures(folder / concept.number)) for concept in concepts}
    styles = [concept.number for concept in concepts if kind_of(concept) == "style"]
    halves_of_others = others[0::2], others[1::2]
    for concept in concepts:
        *references, setting, trying = examples[concept.number]
        sets = []
        for example, half in ((setting, halves_of_others[0]), (trying, halves_of_others[1])):
            if concept.number in styles:
                flipped = ImageOps.mirror(example)
                sets.append(([example, flipped], half))
            else:
                beside = [paste_side_by_side(*((example, other) if i % 2 else (other, example)), side) for i, other in enumerate(half)]
                without = [paste_side_by_side(half[i - 1], other, side) for i, other in enumerate(half)]
                sets.append((beside, without))
        add_finder(finders, validation, concept.number, grader, references, sets)
    for style in styles:
        for subject in (concept.number for concept in concepts if concept.number not in styles):
            real = folder / f"{subject}+{style}"
            if real.is_dir():
                both = example_pictures(real)
                sets = [(both[1::3], examples[style]), (both[2::3], [ImageOps.mirror(picture) for picture in examples[style]])]
                add_finder(finders, validation, f"{subject} in {style}", grader, both[0::3], sets)
    medium = row.medium
    for style in (concept for concept in concepts if concept.number in styles):
        for subject in (concept for concept in concepts if f"{concept.number} in {style.number}" in finders):
            key = f"{style.number} on {subject.number}"
            names = (style.src_image, *row.several.other_styles)
            finders[key] = CaptionFinder(grader, [f"a {medium} of a {subject.src_image} in the style of {name}" for name in names], halves=False)
            validate(finders, validation, key, example_pictures(folder / f"{subject.number}+{style.number}"), examples[subject.number])
    finders["ordinary"] = CaptionFinder(grader, [f"a {medium} of a {name}" for name in (ordinary, *(n for n in labels if n != ordinary))])
    return finders, validation


def most_typical_last(grader, pictures):
    """The pictures in the order of their mean cosine to each other."""
    features = grader.of_pictures(pictures)
    return [pictures[i] for i in (features @ features.T).sum(1).argsort().tolist()]


def add_finder(finders, validation, key, grader, references, sets):
    """A `Finder`, set by the first (pictures with it, pictures without) of sets, tried on the second."""
    (present, absent), (new_present, new_absent) = sets
    finders[key] = Finder(grader, references, present, absent)
    validate(finders, validation, key, new_present, new_absent)


def validate(finders, validation, key, new_present, new_absent):
    """Notes in which share of pictures with it and without it a finder finds its concept."""
    validation[key] = {"found_where_present": finders[key](new_present).float().mean().item(), "present": len(new_present),
                       "found_where_absent": finders[key](new_absent).float().mean().item(), "absent": len(new_absent)}


def paste_side_by_side(left, right, side):
    """A real picture of two: the squares in their middles, at half size beside each other, on the left one's ground."""
    picture = Image.new("RGB", (side, side), left.getpixel((0, 0)))
    for i, part in enumerate((left, right)):
        picture.paste(ImageOps.fit(part, (side // 2, side // 2), Image.Resampling.BOX), (i * side // 2, side // 4))
    return picture


def beside(first, second, upright=False):
    """Two pictures at half size beside each other, or with `upright` above each other, on the first one's ground."""
    side = min(first.size)
    if not upright:
        return paste_side_by_side(first, second, side)
    turned = [picture.transpose(Image.Transpose.TRANSPOSE) for picture in (first, second)]
    return paste_side_by_side(*turned, side).transpose(Image.Transpose.TRANSPOSE)


def blend(first, second):
    """Both, half transparent."""
    return Image.blend(first, second.resize(first.size), 0.5)


def chimera(first, second):
    """The left half of the first and the right half of the second, as one thing."""
    picture, half = first.copy(), first.width // 2
    picture.paste(second.resize(first.size).crop((half, 0, *first.size)), (half, 0))
    return picture
