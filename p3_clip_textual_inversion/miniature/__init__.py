"""The workshop, where a user need not look: the small world that everything runs on where there are no real weights (README.md).

The map; a file imports only from floors with a lower number, and from those below this room:

     1  world (scenes and their captions), together (learned subjects in one picture)
     2  painting (the pictures of scenes), challenge (the later challenge's prompts)
     3  drawings (emoji, the concepts and their examples), models (the networks), scores (how well the miniature draws)
     4  train (of all parts), words (what learning a word is worth), bench (the benchmark of subjects)
"""
