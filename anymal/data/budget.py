"""How many views each medium of a sample gets, so that the sample fits: Eagle 2.5's automatic degradation.

Source: arXiv 2504.15271: the text is kept whole, and what is left of the context is shared by the media. Runs in loader
workers, between decoding a sample's media and cutting them into views.
"""

from collections.abc import Sequence


def degrade(choices: Sequence[Sequence[int]], room: int) -> list[int]:
    """The number of views of each medium: as many as `room` allows, and none loses more than it must.

    The medium with the most views steps down first (of equal ones the last), as often as it takes.

    Args:
        choices: For each medium the numbers of views that it can be shown in, the largest first.
        room: Views that fit in all.

    Returns:
        One of its choices for each medium: the least of each where even these do not fit.
    """
    place = [0] * len(choices)

    def views(i: int) -> int:
        return choices[i][place[i]]

    while sum(map(views, range(len(choices)))) > room:
        open_ones = [i for i in range(len(choices)) if place[i] + 1 < len(choices[i])]
        if not open_ones:
            break
        place[max(open_ones, key=lambda i: (views(i), i))] += 1
    return [views(i) for i in range(len(choices))]
