"""How many views each medium of a sample gets, so that the sample fits: Eagle 2.5's automatic degradation.

Source: arXiv 2504.15271. The text is kept whole; the media share what is left of ``data.max_tokens``. Called by
`prompt` in loader workers, once the text is tokenised.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from anymal.data import feature_codec
from anymal.sample import Features, Part, Viewable, Views


def show(media: Sequence[Part], tokens: Mapping[str, int], room: int) -> list[Tensor | Views | Features]:
    """What is encoded of each medium: of those that can be cut into views, as many views as there is room for.

    Args:
        media: The decoded media of a sample.
        tokens: K of each modality.
        room: Tokens that all media together may take.

    Raises:
        BadSample: Views are not finite, or too large (see `anymal.data.feature_codec.check`).
    """
    choices = [[tokens[p.kind] * n for n in p.content.choices] for p in media if isinstance(p.content, Viewable)]
    fixed = sum(tokens[part.kind] for part in media if not isinstance(part.content, Viewable))
    granted = iter(degrade(choices, room - fixed))
    return [
        _cut(part, part.content, next(granted) // tokens[part.kind])
        if isinstance(part.content, Viewable)
        else part.content
        for part in media
    ]


def _cut(part: Part, medium: Viewable, count: int) -> Views:
    views = medium.views(count)
    feature_codec.check(views.tensor, f"the {part.kind} {part.member}, once decoded,")
    return views


def degrade(choices: Sequence[Sequence[int]], room: int) -> list[int]:
    """The tokens of each medium, so that all together take at most `room`.

    The medium that takes most tokens (of equal ones the last) gets its next smaller choice, until all fit.

    Args:
        choices: For each medium the numbers of tokens that it can take, the largest first.
        room: Tokens that fit in all.

    Returns:
        One of its choices for each medium: the least of each where even these do not fit.
    """
    steps = [0] * len(choices)

    def tokens(i: int) -> int:
        return choices[i][steps[i]]

    while sum(map(tokens, range(len(choices)))) > room:
        reducible = [i for i in range(len(choices)) if steps[i] + 1 < len(choices[i])]
        if not reducible:
            break
        steps[max(reducible, key=lambda i: (tokens(i), i))] += 1
    return [tokens(i) for i in range(len(choices))]
