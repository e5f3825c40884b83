"""Where the things of a prompt are: as --regions tells, or as its words do (on the left, above, next to, ...), and what each thing's region is told.

    plan("a <new1> next to a cat on a hill", "auto", ["<new1>"])
    # Region("a <new1> next to a <new1> on a hill", (0, 0, 0.5, 1), ...), Region("a cat next to a cat on a hill", (0.5, 0, 1, 1), ...)

A box is (left, top, right, bottom) in shares of the picture. Learned words are written out (embedding.expand) wherever texts are a model's.
"""

import re
from itertools import pairwise
from typing import NamedTuple

from .files import UserError

AUTO, LEARNED = "auto", "learned"  # by the prompt's words; the same only where two learned words are apart: another thing may be scenery
PLACES = {"left": (0.0, 0.0, 0.5, 1.0), "right": (0.5, 0.0, 1.0, 1.0), "top": (0.0, 0.0, 1.0, 0.5), "bottom": (0.0, 0.5, 1.0, 1.0)}
RELATIONS = {  # of what stands between two things: (axis, whether the first comes first along it)
    "next to": (0, True), "beside": (0, True), "to the left of": (0, True), "left of": (0, True), "to the right of": (0, False), "right of": (0, False),
    "on the left of": (0, True), "on the right of": (0, False), "above": (1, True), "on top of": (1, True), "below": (1, False), "under": (1, False)}
BETWEEN = re.compile(rf"\s+({'|'.join(sorted(RELATIONS, key=len, reverse=True))})\s+", re.IGNORECASE)
PLACED = re.compile(rf"\s+(?:on|at|to|in)\s+the\s+({'|'.join(PLACES)})(?:\s+side|\s+half)?\b(?!\s+of\b)", re.IGNORECASE)
AND = re.compile(r",?\s+and\s+", re.IGNORECASE)  # both are there, and nothing tells where
LISTED = re.compile(r"\s*(?:,|&|,?\s+and)\s*", re.IGNORECASE)  # likewise; what wears, holds or stands in another thing has no place of its own
SPECIFIC = r"(?:an?|the)\s+"
ARTICLE = re.compile(r"(?:an?|the|one|my)\s+\w", re.IGNORECASE)
END = re.compile(  # where the words of a thing begin or end
    r"\s+(?:of|on|in|at|against|from|by|to|for|over|with|and|near|behind|beneath|inside|atop|amid|among|around|through|along|across|between)\s+|[,.;:]",
    re.IGNORECASE)
DOING = re.compile(r"\s+(?:both|side|\w+ing)$", re.IGNORECASE)  # behind a learned word: no part of the thing
STYLE = re.compile(  # it has no place, and stays in what every region is told
    r",?\s+in\s+(?:(?:the\s+)?style\s+of|(?:an?\s+|the\s+)?(?:(?:\S*[<>]\S*\s+)+|\w+[ -])style)\b.*", re.IGNORECASE | re.DOTALL)


class Region(NamedTuple):
    """text: what it is told; box: (left, top, right, bottom) in shares of the picture, or None where the prompt's attention will tell; before, thing: of
    the prompt, what stands before the thing's words, and these. Learned words are written out in all of them."""
    text: str
    box: tuple | None
    before: str
    thing: str


def read_regions(texts):
    """What --regions was given: () for nothing and "none", "auto", "learned", or ((name, (left, top, right, bottom)), ...), checked."""
    if not texts or texts in ([AUTO], [LEARNED], ["none"]):
        return texts[0] if texts and texts != ["none"] else ()
    found = []
    for text in texts:
        name, _, numbers = str(text).rpartition("=")
        try:
            found.append((name.strip(), [float(number) for number in numbers.split(",")]))
        except ValueError:
            found.append(("", []))
        if not found[-1][0] or len(found[-1][1]) != 4:
            raise UserError(f"--regions {text!r} is no region; expected {AUTO} alone, or a thing of the prompt and its box, as in '<new1>=0,0.2,0.5,1' "
                            "(left, top, right, bottom, in shares of the picture)")
    return regions_of(found)


def regions_of(content):
    """The same of ("auto", "learned" or) lists of a name and a box, as a PNG tells them."""
    if content in (AUTO, LEARNED):
        return content
    found = tuple((name, (left, top, right, bottom)) for name, (left, top, right, bottom) in content)
    for name, (left, top, right, bottom) in found:
        if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
            raise UserError(f"the box {left:g},{top:g},{right:g},{bottom:g} of {name!r} is none in shares of the picture; expected left, top, right, bottom "
                            "with 0 <= left < right <= 1 and 0 <= top < bottom <= 1")
    return found


def check_regions(regions, prompts):
    """A `UserError` for a region of what is in none of the prompts (learned words not written out)."""
    for name, _ in regions if regions not in (AUTO, LEARNED) else ():
        if not any(own_places(name, regions, prompt) for prompt in prompts):
            raise UserError(f"--regions: {name!r} is in none of the prompts, such as {prompts[0]!r}; give a learned word or another thing of a prompt")


def places_of(name, prompt):
    """The (start, end) of a thing's words in a prompt, with their article, wherever they stand."""
    return [match.span() for match in re.finditer(rf"(?:\b{SPECIFIC})?(?<![\w<]){re.escape(name)}(?![\w>])", prompt, re.IGNORECASE)]


def own_places(name, regions, prompt):
    """`places_of` a thing of --regions, but those within another one's, as cat's in "a black cat" where that has a region itself."""
    others = [span for other, _ in regions for span in places_of(other, prompt)]
    return [(s, e) for s, e in places_of(name, prompt) if not any(start <= s and e <= end and (s, e) != (start, end) for start, end in others)]


def plan(prompt, regions, words=()):
    """The `Region`s of a prompt, none where there is nothing to tell apart. prompt: learned words written out, as they are in regions (`read_regions`) and in
    words, those that have one."""
    if regions in (AUTO, LEARNED):
        spans = things_told(prompt, words, apart=2 if regions == LEARNED else 0)
    else:
        seen, spans = {}, []
        for name, box in regions:  # a name that comes several times: its places in turn
            found = own_places(name, regions, prompt)
            if (k := seen.setdefault(name, 0)) < len(found):
                spans.append((*found[k], box))
            seen[name] += 1
    spans.sort(key=lambda span: span[:2])
    return [Region(with_thing(prompt, spans, prompt[start:end]), box, prompt[:start], prompt[start:end]) for start, end, box in spans]


def with_thing(prompt, spans, thing):
    """The prompt with one thing in the place of every thing, with one article there: "a black cat next to a dog" of "cat" and "a dog" has "a black dog"."""
    own, name = split_article(thing)
    for start, end, _ in sorted(spans, reverse=True):
        article = split_article(prompt[start:end])[0]
        prompt = f"{prompt[:start]}{article and (own or article)}{name}{prompt[end:]}"
    return prompt


def split_article(thing):
    """("a ", "cat") of "a cat"; ("", "cat") of "cat"."""
    end = match.end() if (match := re.match(SPECIFIC, thing, re.IGNORECASE)) else 0
    return thing[:end], thing[end:]


def things_told(prompt, words, apart=0):
    """[(start, end, box)] of the things of a prompt and where its words say that they are. Of things that are only listed ("a <new1> and a cat") the boxes are
    None. A prompt that has not two things, whose learned words are not all among them, or that tells another relation ("a <new1> wearing <new2>"), has none;
    nor has one of which fewer than `apart` things are learned."""
    body = STYLE.sub("", prompt)
    learned = [span for word in words for span in places_of(word, body)]

    def complete(spans):
        with_learned = [any(start <= s and e <= end for s, e in learned) for start, end, *_ in spans]
        return any(spans) and sum(with_learned) >= apart and all(any(start <= s and e <= end for start, end, *_ in spans) for s, e in learned)

    def thing(span):  # without what it does
        start, end = span
        doing = DOING.search(body, start, end)
        return start, doing.start() if doing and any(start <= s and e <= doing.start() for s, e in learned) else end

    def before(end):
        return thing(phrase_before(body, end))

    def after(start):
        return thing(phrase_after(body, start))
    placed = [(*before(match.start()), PLACES[match[1].lower()]) for match in PLACED.finditer(body)]
    if len({box for *_, box in placed}) > 1 and complete(placed):
        return placed
    between = list(BETWEEN.finditer(body))
    if len({RELATIONS[match[1].lower()] for match in between}) == 1:
        (axis, forwards), = {RELATIONS[match[1].lower()] for match in between}
        spans = [before(between[0].start()), *(after(match.end()) for match in between)]
        boxes = strips(len(spans), axis)
        if complete(spans):
            return [(*span, box) for span, box in zip(spans, boxes if forwards else boxes[::-1])]
    both = [[before(match.start()), after(match.end())] for match in AND.finditer(body)]
    learned.sort()
    starts = {start for start, _ in learned}  # with their articles
    both = [pair for pair in both if all(start in starts or ARTICLE.match(body[start:end]) for start, end in pair)]  # not "black and white"
    listed = len(learned) > 1 and all(LISTED.fullmatch(body[end:start]) for (_, end), (start, _) in pairwise(learned))
    spans = next((pair for pair in both if learned and complete(pair)), learned if listed else [])
    return [(*span, None) for span in spans]


def phrase_before(text, end):
    """(start, end) of the last thing before a place in a text: "a drawing of a cat" -> "a cat"."""
    start = max((match.end() for pattern in (END, BETWEEN, PLACED) for match in pattern.finditer(text[:end] + " ") if match.end() <= end), default=0)
    return start + len(text[start:end]) - len(text[start:end].lstrip()), end


def phrase_after(text, start):
    """(start, end) of the first thing behind a place in a text: "a cat on a hill" -> "a cat"."""
    return start, min((match.start() for pattern in (END, BETWEEN) if (match := pattern.search(text, start))), default=len(text.rstrip()))


def strips(count, axis):
    """Boxes of the same size, from left to right (axis 0) or from top to bottom (axis 1)."""
    edges = [i / count for i in range(count + 1)]
    return [(low, 0.0, high, 1.0) if axis == 0 else (0.0, low, 1.0, high) for low, high in pairwise(edges)]


def arranged(points):
    """`strips` for things at points (x, y), 0..1 from the upper left corner, in their order: beside each other or above, as they differ more."""
    spread = [max(values) - min(values) for values in zip(*points)]
    axis = 0 if spread[0] >= spread[1] else 1
    order = sorted(range(len(points)), key=lambda i: points[i][axis])
    return [strips(len(points), axis)[order.index(i)] for i in range(len(points))]
