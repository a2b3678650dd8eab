"""How sure an accuracy is."""

import math

Z95 = 1.959963984540054  # a normal variable lies within so many standard deviations of its mean in 95 of 100 cases


def wilson(right: int | float, count: int, z: float = Z95) -> tuple[float, float]:
    """Returns the interval, in percent, that holds the accuracy of which `right` of `count` images are a sample.

    Wilson's score interval (1927), of 95 % by default: unlike the normal one it stays inside 0 to 100 and holds for few
    images as well. It is about the images that were drawn for the evaluation, not about seeds of the training.
    """
    share, spread = right / count, z * z / count
    center = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return 100 * max(0.0, center - half), 100 * min(1.0, center + half)
