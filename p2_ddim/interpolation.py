"""Interpolation between two noises, and mixtures of any number."""

import torch

NEARLY = 1e-4  # radians: closer than this to parallel (or opposite), the great circle has no safe formula


def lerp(a, b, alpha):
    """(1 - alpha) a + alpha b, for tensors of any equal shape. Between independent noises its norm falls to 1/sqrt(2) in the middle."""
    return (1 - alpha) * a + alpha * b


def slerp(a, b, alpha):
    """Spherical interpolation (Shoemake 1985): sin((1-alpha) theta)/sin(theta) a + sin(alpha theta)/sin(theta) b, theta the angle between the
    whole tensors, any equal shape, computed in float64. alpha in [0, 1].

    Nearly parallel tensors: lerp, its limit. Nearly opposite ones: all great circles are as short; it takes the one through `right_angle(a)`."""
    u, v = a.double().flatten(), b.double().flatten()
    norm_a, norm_b = u.norm(), v.norm()
    if norm_a == 0 or norm_b == 0:
        return lerp(a, b, alpha)
    u, v = u / norm_a, v / norm_b
    theta = 2 * torch.atan2((u - v).norm(), (u + v).norm())  # exact also where the cosine is near 1 or -1
    alpha = torch.as_tensor(alpha, dtype=torch.float64, device=a.device)
    if theta < NEARLY:
        return lerp(a, b, alpha.to(a.dtype))
    if torch.pi - theta < NEARLY:
        side = right_angle(u)
        direction = (torch.pi * alpha).cos() * u + (torch.pi * alpha).sin() * side
        return (((1 - alpha) * norm_a + alpha * norm_b) * direction).reshape(a.shape).to(a.dtype)
    wa, wb = ((1 - alpha) * theta).sin() / theta.sin(), (alpha * theta).sin() / theta.sin()
    return wa.to(a.dtype) * a + wb.to(b.dtype) * b


def mix(noises, weights):
    """sum w_i x_i / sqrt(sum w_i^2) for n independent standard normal noises, of any equal shape, and weights of which none is below 0 and one is above.

    The sum of independent Gaussians has the variance sum w_i^2: divided by its root, the mixture is standard normal whatever the weights. For two noises
    this is nearly slerp, with alpha = 2/pi arctan(w_2 / w_1): in high dimension independent noises stand at right angles, and have one length."""
    if len(noises) != len(weights) or not len(weights) or not all(0 <= w < float("inf") for w in weights) or not max(weights) > 0:
        raise ValueError(f"{len(noises)} noises need as many weights from 0, one of them above, not {weights}")
    total = sum(w**2 for w in weights) ** 0.5
    return sum(w / total * x for w, x in zip(weights, noises))


def right_angle(u):
    """A unit vector at right angles to the unit vector u [N]: (-u2, u1, -u4, u3, ...), for odd N made orthogonal once more."""
    side = torch.zeros_like(u)
    even = len(u) - len(u) % 2
    side[0:even:2], side[1:even:2] = -u[1:even:2], u[0:even:2]
    if side.norm() < 0.5:  # an odd vector that is nearly all in its last element
        side = torch.zeros_like(u)
        side[0] = 1
    side = side - (side @ u) * u
    return side / side.norm()
