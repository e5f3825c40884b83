"""P1: a class- and domain-conditional DDPM with classifier-free guidance on MNIST-M and SVHN digits."""

from .guard import begin

begin()
