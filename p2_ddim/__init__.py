"""P2: DDIM sampling, interpolation and inversion on an unconditional face UNet.

The map; a file imports only from floors with a lower number (scripts/tests/test_house.py):

     1  guard (how a command begins and is interrupted)
     2  files (errors in one line, whole writes, locks), samplers (the update rules), interpolation (slerp, lerp, n noises), reference (the same by diffusers)
     3  pictures (one careful reader), tensors (one careful reader), device (where and in which format), inversion (pictures to noises)
     4  model (the face UNet), diffusion (schedule, loss), training (optimisers, averages), state (to go on from), provenance (of a picture), estimate (of time)
     5  data (noises and faces), evaluate (the grade)
     6  inference (the graded files)
     7  train (the training), redraw (a picture again), edit (from picture to picture), quality (faces measured), benchmark (speed by kind of layer)
     8  sweep (samplers compared), figures (the report's), make_mini (the bundled faces), minimal (the problem on one page)
"""

from .guard import begin

begin()
