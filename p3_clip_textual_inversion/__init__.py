"""P3: CLIP zero-shot classification, and personalising Stable Diffusion by textual inversion."""
