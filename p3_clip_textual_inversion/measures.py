"""What is counted and estimated of a classifier."""

import math


def interval(hits, count, z=1.96):
    """Wilson's 95 % interval of a share."""
    p = hits / count
    middle, half = p + z**2 / (2 * count), z * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    return [(middle - half) / (1 + z**2 / count), (middle + half) / (1 + z**2 / count)]
