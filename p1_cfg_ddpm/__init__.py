"""P1: a class- and domain-conditional DDPM with classifier-free guidance on MNIST-M and SVHN digits.

The map; a file imports only from floors with a lower number (scripts/tests/test_house.py):

     1  guard (how a command begins and is interrupted)
     2  files (errors in one line, whole writes, locks), samplers (the update rules), diffusion (schedules, loss, guidance)
     3  pictures (one careful reader), tensors (one careful reader), device (where and in which format)
     4  model (the conditional UNet), reading (which digit it sees), training (optimisers, averages), state (to go on from), provenance, estimate (of time)
     5  data (the course's layout), inference (the graded files)
     6  classifier (the judges), train (the training), paths (a teacher's, for a student), redraw (a picture again)
     7  embedding (features without labels), distill (a student of few evaluations)
     8  quality (Fréchet distance, coverage)
     9  evaluate (the grade)
    10  benchmark (speed and quality of samplers)
    11  pareto (which settings draw best)
    12  figures (the report's), make_mini (the bundled digits), minimal (the problem on one page)
"""

from .guard import begin

begin()
