"""Models and words as other programs save them: read, checked and never run.

The map; a file imports only from floors with a lower number, and from those below this room:

     1  checkpoint (any file of weights, TorchScript too), memo (what was read of large files)
     2  identity (by what a Stable Diffusion is known), open_clip_folder (a CLIP as open_clip saves it)
     3  hugging_face (a CLIP as transformers saves it), words (learned words of any program)
"""
