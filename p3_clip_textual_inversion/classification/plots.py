"""What a zero-shot classification looks like: examples, confusions, calibration, the nearest pictures to pictures."""

from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..measures import expected_calibration_error, reliability
from ..pictures import PARTS, chart, read_picture, save_image

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
GREEN, RED, GRAY, LIGHT = (46, 125, 50), (198, 40, 40), (190, 198, 206), (240, 242, 244)
SUREST, LEAST_SURE = 3, 2  # of the five successes and of the five failures
SIDE, WIDTH, BAR = 132, 208, 21  # of an example: its picture, its column, each bar, in pixels
NEAREST = 3
QUERIES, ANSWERS = 10, 6  # of the retrieval sheet


def font(size):
    return ImageFont.truetype(str(FONT), size)


def choose(confidence, truth, rows):
    """Of these rows the surest three and the least sure two, each of another class, if there are so many: [(row, "surest" or "least sure")]."""
    rows = sorted(rows, key=lambda row: -confidence[row].item())
    chosen, seen = [], set()
    for order, count, what in ((rows, SUREST, "surest"), (rows[::-1], LEAST_SURE, "least sure")):
        for row in order:
            if sum(w == what for _, w in chosen) < count and truth[row].item() not in seen:
                seen.add(truth[row].item())
                chosen.append((row, what))
    return chosen


def thumbnail(path, side):
    """A picture as a square: its middle."""
    picture = read_picture(path)
    short = min(picture.size)
    left, top = (picture.width - short) // 2, (picture.height - short) // 2
    resampling = Image.Resampling.NEAREST if short < side else Image.Resampling.BOX  # small ones are shown as they are
    return picture.resize((side, side), resampling, box=(left, top, left + short, top + short))


def draw_examples(data, features, outcome, path):
    """Five successes above five failures, each with its five likeliest classes; below a failure the pictures nearest to it in the class it was taken for."""
    heights = [SIDE + 24 + 5 * BAR + 30, SIDE + 24 + 5 * BAR + 36 + WIDTH // NEAREST]
    sheet = Image.new("RGB", (5 * (WIDTH + 14) + 14, sum(heights) + 2 * 30), "white")
    draw, top, parts = ImageDraw.Draw(sheet), 0, []
    for right, height, colour in ((True, heights[0], GREEN), (False, heights[1], RED)):
        group = (outcome.right == right).nonzero()[:, 0].tolist()
        title = f"{'right' if right else 'wrong'}: {len(group)} of {len(data.truth)}"
        draw.text((14, top + 8), f"{title}; the surest and the least sure, one a class", colour, font(15))
        for column, (row, what) in enumerate(choose(outcome.confidence, data.truth, group)):
            place = (14 + column * (WIDTH + 14), top + 34)
            draw_example(sheet, draw, place, data, features, outcome, row, what)
            parts.append({"box": [place[0] - 6, top + 34, WIDTH + 12, height - 10], "title": "right" if right else "wrong",
                          "label": f"{data.names[data.truth[row]]}, {what}"})
        top += height + 30
    sheet.info[PARTS] = parts
    save_image(sheet, path)


def draw_example(sheet, draw, place, data, features, outcome, row, what):
    x, y = place
    sheet.paste(thumbnail(data.paths[row], SIDE), (x + (WIDTH - SIDE) // 2, y))
    true = data.truth[row].item()
    draw.text((x + WIDTH / 2, y + SIDE + 12), f"{shorten(data.names[true], 20)} ({what})", "black", font(14), anchor="mm")
    y += SIDE + 24
    for k in outcome.order[row, :5].tolist():
        chance = outcome.probability[row, k].item()
        draw.rectangle((x, y + 1, x + WIDTH, y + BAR - 3), fill=LIGHT)
        draw.rectangle((x, y + 1, x + round(WIDTH * chance), y + BAR - 3), fill=(150, 205, 150) if k == true else GRAY)
        draw.text((x + 4, y + BAR / 2 - 1), shorten(data.names[k], 19), "black", font(13), anchor="lm")
        draw.text((x + WIDTH - 4, y + BAR / 2 - 1), f"{chance:.1%}", "black", font(13), anchor="rm")
        y += BAR
    guess = outcome.order[row, 0].item()
    others = [other for other in (data.truth == guess).nonzero()[:, 0].tolist() if other != row]
    if guess != true and others:
        near = sorted(others, key=lambda other: -(features[row] @ features[other]).item())[:NEAREST]
        draw.text((x + WIDTH / 2, y + 12), f"nearest of {shorten(data.names[guess], 20)}", "black", font(13), anchor="mm")
        for i, other in enumerate(near):
            sheet.paste(thumbnail(data.paths[other], WIDTH // NEAREST - 4), (x + i * (WIDTH // NEAREST) + 2, y + 26))


def shorten(text, length):
    return text if len(text) <= length else text[:length - 1].rstrip() + "…"


def similarity_order(directions):
    """An order of classes in which similar ones stand beside each other: a chain, each next class the most similar of those left to either of its ends."""
    similarity = directions.double() @ directions.double().T
    similarity.fill_diagonal_(-2)
    chain = [0] if len(directions) == 1 else list(divmod(similarity.argmax().item(), len(directions)))
    while len(chain) < len(directions):
        ends = similarity[[chain[0], chain[-1]]].clone()
        ends[:, chain] = -2
        end, nearest = divmod(ends.argmax().item(), len(directions))
        chain = [*chain, nearest] if end else [nearest, *chain]
    return chain


def draw_confusion(data, outcome, directions, path):
    """A row for each class, a column for each guess, similar classes beside each other: green what is right, red what is not, darker the larger its share."""
    order = [k for k in similarity_order(directions) if (data.truth == k).any() or (outcome.order[:, 0] == k).any()]
    place, count = {k: i for i, k in enumerate(order)}, len(order)
    share = np.zeros((count, count))
    for t, p in zip(data.truth.tolist(), outcome.order[:, 0].tolist()):
        share[place[t], place[p]] += 1
    share /= np.maximum(share.sum(1, keepdims=True), 1)
    cell = max(3, min(15, 1000 // count))
    letters = font(min(cell, 11)) if cell >= 8 else None
    margin = max(round(letters.getlength(shorten(data.names[k], 18))) for k in order) + 10 if letters else 20
    full = np.where(np.eye(count, dtype=bool)[..., None], GREEN, RED)
    pixels = 255 - share[..., None] ** 0.7 * (255 - full)  # a single confusion of ten shall be seen
    squares = Image.fromarray(pixels.round().astype(np.uint8)).resize((count * cell, count * cell), Image.Resampling.NEAREST)
    sheet = Image.new("RGB", (margin + count * cell + 10, margin + count * cell + 10), "white")
    draw, above = ImageDraw.Draw(sheet), ImageDraw.Draw(turned := Image.new("RGB", (margin, count * cell), "white"))
    for i, k in enumerate(order if letters else ()):
        name = shorten(data.names[k], 18)
        draw.text((margin - 4, margin + (i + 0.5) * cell), name, "black", letters, anchor="rm")
        above.text((4, (i + 0.5) * cell), name, "black", letters, anchor="lm")
    sheet.paste(turned.transpose(Image.Transpose.ROTATE_90), (margin, 0))
    sheet.paste(squares, (margin, margin))
    for i in range(count + 1):
        near, far, at = margin, margin + count * cell, margin + i * cell
        draw.line((near, at, far, at), (230, 232, 235))
        draw.line((at, near, at, far), (230, 232, 235))
    draw.text((6, 6), "rows: true\ncolumns:\nguessed", "black", font(10))
    save_image(sheet, path)


def draw_calibration(outcome, path):
    """Share right against confidence, in bins, before and after the temperature: on the diagonal a confidence is honest."""
    def panel(axis, confidence, title):
        count, sure, share = zip(*reliability(confidence, outcome.right))
        axis.plot([0, 1], [0, 1], color="gray", linewidth=1)
        axis.scatter(sure, share, s=[12 + 400 * c / len(outcome.right) for c in count], color="tab:blue", alpha=0.75)
        axis.set(xlim=(0, 1.04), ylim=(-0.04, 1.04), xlabel="confidence in the first guess", ylabel="share right (area: pictures)",
                 title=f"{title}\nexpected calibration error {expected_calibration_error(confidence, outcome.right):.1%}")
    chart([partial(panel, confidence=outcome.confidence, title="as CLIP says"),
           partial(panel, confidence=outcome.calibrated, title="at a temperature fitted on other pictures")], path)


def nearest_pictures(features, count):
    """The nearest other pictures to each, by cosine: int [N, count]."""
    similarity = features @ features.T
    return similarity.fill_diagonal_(-2).topk(min(count, len(features) - 1), dim=1).indices


def draw_retrieval(data, features, path):
    """Pictures of ten classes, each with the pictures nearest to it; a frame says whether they are of its class."""
    near, side = nearest_pictures(features, ANSWERS), 84
    classes = data.truth.unique()
    rows = [(data.truth == k).nonzero()[0, 0].item() for k in classes[np.linspace(0, len(classes) - 1, min(QUERIES, len(classes))).round().astype(int)]]
    sheet = Image.new("RGB", (190 + (side + 8) * (1 + near.shape[1]), 34 + len(rows) * (side + 8)), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((190, 10), "picture", "black", font(12))
    draw.text((190 + side + 8, 10), "the nearest others (green: of its class)", "black", font(12))
    for i, row in enumerate(rows):
        y = 30 + i * (side + 8)
        draw.text((180, y + side / 2), shorten(data.names[data.truth[row]], 22), "black", font(13), anchor="rm")
        sheet.paste(thumbnail(data.paths[row], side), (190, y))
        for j, other in enumerate(near[row].tolist()):
            x = 190 + (j + 1) * (side + 8)
            draw.rectangle((x - 3, y - 3, x + side + 2, y + side + 2), fill=GREEN if data.truth[other] == data.truth[row] else RED)
            sheet.paste(thumbnail(data.paths[other], side), (x, y))
    sheet.info[PARTS] = [{"box": [186, 26, (side + 8) * (1 + near.shape[1]), len(rows) * (side + 8)], "rows": [data.names[data.truth[row]] for row in rows],
                          "columns": ["picture", *range(1, near.shape[1] + 1)]}]
    save_image(sheet, path)
