"""P2: DDIM sampling, interpolation and inversion on an unconditional face UNet."""

from .guard import begin

begin()
