"""Tiles: a large picture as several views, each encoded as a picture of its own. Pure functions of sizes and pictures.

    picture ──grid──▶ (columns, rows) ──cut──▶ whole view, then tiles in reading order ──encoder──▶ …

A view is a square of `side` pixels. Which grid a picture gets is one of the rules in `GRIDS`:

- ``CxR``, such as 2x2: always these columns and rows. SPHINX (arXiv 2311.07575) with views of 224 pixels: the picture
  at 448 x 448 as four corners, and once whole at 224 x 224. Mini-Gemini-HD (arXiv 2403.18814) with views of 768.
- ``any_resolution``, LLaVA-NeXT: of a few grids the one that keeps the most pixels of the picture, then wastes least.
- ``area``, Eagle 2.5 (arXiv 2504.15271, image area preservation): of all grids of at most so many tiles the one whose
  area and aspect ratio come nearest to the picture's.
"""

import re
from collections.abc import Callable, Sequence

from PIL import Image

from anymal.errors import UserError

Size = tuple[int, int]  # width, height in pixels
Grid = tuple[int, int]  # columns, rows
Colour = tuple[int, int, int]  # red, green, blue

LLAVA_NEXT: tuple[Grid, ...] = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
ENOUGH_AREA = 0.6
"""Eagle 2.5: an enlargement beyond this share of the picture's area earns no more."""


def any_resolution(size: Size, side: int, grids: Sequence[Grid] = LLAVA_NEXT) -> Grid:
    """The grid that keeps most of the picture's own pixels when it is scaled to fit in, then the smallest such."""
    from transformers.image_processing_utils import select_best_resolution

    height, width = select_best_resolution(size[::-1], [(rows * side, columns * side) for columns, rows in grids])
    return width // side, height // side


def area_preserving(size: Size, side: int, most: int) -> Grid:
    """The grid of at most `most` tiles with the largest min(A'/A, 0.6) · min(r'/r, r/r').

    A and r are area and aspect ratio (width over height) of the picture, A' and r' those of the grid. Of equal ones the
    one with the fewest tiles, then the fewest columns.
    """
    ratio = size[0] / size[1]

    def worth(grid: Grid) -> float:
        area = grid[0] * grid[1] * side * side / (size[0] * size[1])
        theirs = grid[0] / grid[1]
        return min(area, ENOUGH_AREA) * min(theirs / ratio, ratio / theirs)

    every = [(columns, rows) for columns in range(1, most + 1) for rows in range(1, most // columns + 1)]
    return max(sorted(every, key=lambda grid: (grid[0] * grid[1], grid[0])), key=worth)


def grid_rule(name: str) -> Callable[[Size, int, int], Grid]:
    """The rule of that name: (size of the picture, side of a view, most tiles) → columns and rows.

    Raises:
        UserError: There is no such rule.
    """
    if fixed := re.fullmatch(r"([1-9])x([1-9])", name):
        return _Fixed((int(fixed[1]), int(fixed[2])))
    if name not in GRIDS:
        raise UserError(f"tiles is {name!r}; it can be {', '.join(GRIDS)}, or columns x rows such as 2x2")
    return GRIDS[name]


class _Fixed:
    """The same grid for every picture; picklable."""

    def __init__(self, grid: Grid):
        self.grid = grid

    def __call__(self, size: Size, side: int, most: int) -> Grid:
        return self.grid


def _any_resolution(size: Size, side: int, most: int) -> Grid:
    return any_resolution(size, side, [grid for grid in LLAVA_NEXT if grid[0] * grid[1] <= most] or [(1, 1)])


GRIDS: dict[str, Callable[[Size, int, int], Grid]] = {"any_resolution": _any_resolution, "area": area_preserving}
"""Rules by name, beside the fixed grids."""


def largest_grid(rule: Callable[[Size, int, int], Grid], side: int, most: int) -> int:
    """The most tiles that a rule gives any picture: tried on the shapes that fill each grid of at most `most` tiles."""
    shapes = [(c, r) for c in range(1, most + 1) for r in range(1, most // c + 1)]
    grids = [rule((columns * side, rows * side), side, most) for columns, rows in shapes]
    return max(columns * rows for columns, rows in grids)


def cut(picture: Image.Image, grid: Grid, side: int, *, pad: Colour | None) -> list[Image.Image | None]:
    """The picture as a whole view, followed by its tiles in reading order; by itself if the grid has a single tile.

    Args:
        picture: Of mode RGB.
        grid: Columns and rows.
        side: Pixels of a view's side.
        pad: Colour of what is left over when the picture is scaled to fit, at the right and below; None squashes it.

    Returns:
        Images of side x side; None for a tile that holds nothing but padding.
    """
    width, height = grid[0] * side, grid[1] * side
    whole, _ = fit(picture, (side, side), pad)
    if grid == (1, 1):
        return [whole]
    canvas, filled = fit(picture, (width, height), pad)
    views: list[Image.Image | None] = [whole]
    for top in range(0, height, side):
        for left in range(0, width, side):
            shows_picture = left < filled[0] and top < filled[1]
            views.append(canvas.crop((left, top, left + side, top + side)) if shows_picture else None)
    return views


def fit(picture: Image.Image, size: Size, pad: Colour | None) -> tuple[Image.Image, Size]:
    """The picture scaled to `size`, and how much of it the picture fills from its upper left corner."""
    if pad is None:
        return picture.resize(size, Image.Resampling.BICUBIC), size
    scale = min(size[0] / picture.width, size[1] / picture.height)
    filled = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    canvas = Image.new("RGB", size, pad)
    canvas.paste(picture.resize(filled, Image.Resampling.BICUBIC))
    return canvas, filled
