"""P3: CLIP zero-shot classification, and personalising Stable Diffusion by textual inversion.

The map; a file imports only from floors with a lower number (scripts/tests/test_house.py):

     1  guard (how a command begins and is interrupted)
     2  files (errors in one line, whole writes, locks), samplers (the update rules), diffusion (loss, guidance), measures (intervals, calibration)
     3  concepts (input.json, prompts.json), pictures, tensors (careful readers), device (where, in which format), places (of things), defaults (a row a model)
     4  data (their pictures), checkpoint (others' files), training (states), provenance (of a picture), estimate, custom_diffusion, memo, lora, subjects
     5  identity (by what a model is known), objective (a word's loss, and the best state by it), open_clip_folder (as open_clip saves), outcome (its scores)
     6  words (files of words, others' too), hugging_face (CLIP as transformers saves it), zero_shot_figures (its pictures)
     7  clip (CLIP and its features), embedding (the token table with new rows)
     8  model (Stable Diffusion's five parts, from anywhere), cache (features kept), finders (is a concept there?), regions, dino
     9  inference (the graded files), adapters (few shots, transduction), fullsize (a file of full size)
    10  evaluate (the grade), sources (what a word is learned from), redraw (a picture again), zero_shot (classification)
    11  train (textual inversion), compare (against untrained words), several (concepts in one picture), both (are two there?), dreambench (the field's)
    12  benchmark (speed), figures (the report's), minimal (the problem on one page)
    13  miniature (the workshop, where a user need not look)
"""

from .guard import begin

begin()
