"""P3: CLIP zero-shot classification, and personalising Stable Diffusion by textual inversion."""

from .guard import begin

begin()
