"""Measurements, a table each, that nobody needs for the graded files.

The map; a file imports only from floors with a lower number, and from those below this room:

     1  finders (is a concept there?), subjects (the field's benchmarks of subjects), dino (features of DINO), fullsize (a model of full size, random)
     2  both (are two things there?), compare (learned against untrained words), several (concepts in one picture, by ways), dreambench (the field's table)
"""
