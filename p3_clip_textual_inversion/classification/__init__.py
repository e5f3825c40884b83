"""What zero_shot.py is made of, beside CLIP itself.

The map; a file imports only from floors with a lower number, and from those below this room:

     1  cache (features kept), outcome (scores, calibration, the table of predictions), plots (examples, confusions)
     2  adapters (few shots, transduction)
"""
