"""P3: CLIP zero-shot classification, and personalising Stable Diffusion by textual inversion.

The map; a file imports only from floors with a lower number, and a room (/), which has a map of its own, is on one (scripts/tests/test_house.py):

     1  guard (how a command begins and is interrupted)
     2  files (errors in one line, whole writes, locks), samplers (the update rules), diffusion (loss, guidance), measures (intervals, calibration)
     3  concepts (input.json, prompts.json), pictures, tensors (careful readers), device (where, in which format), places (of things), defaults (a row a model)
     4  data (their pictures), training, state (to go on from), provenance (of a picture), estimate (how long), custom_diffusion, lora (weights beside words)
     5  formats/ (models and words as other programs save them), objective (a word's loss, what learns by it, the best state)
     6  clip (CLIP and its features), embedding (the token table with new rows)
     7  model (Stable Diffusion's five parts, from anywhere), regions (where things are drawn), classification/ (what zero_shot is made of)
     8  inference (the graded files), evaluate (the grade), zero_shot (classification)
     9  sources (what a word is learned from), redraw (a picture again)
    10  train (textual inversion), figures (the report's), benchmark (speed), minimal (the problem on one page)
    11  experiments/ (a table each)
    12  miniature/ (the workshop, where a user need not look)
"""

from .guard import begin

begin()
