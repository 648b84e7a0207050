"""A picture's bytes → a PIL image, within bounds: what a stranger's file may cost a loader worker is bounded here."""

import io
import math
import re
import warnings

from PIL import Image, ImageOps, UnidentifiedImageError

from anymal.errors import BadSample

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
"""What is decoded. Pillow knows more; some of those start other programs, and none holds photos on the web."""
ANIMATED = ("GIF", "PNG", "WEBP")
"""Of these, those whose further frames are moments; a JPEG's are previews and depth maps of the same."""
ORIENTATION = 0x0112
"""The Exif tag that says how a camera was held."""
LARGE = 1 << 24
"""Pixels of a picture that is decoded as it is (4096 x 4096): of a larger one, squares of 2 x 2 pixels (or more) are
averaged first, a strip at a time, since every copy of 64 million pixels takes 256 MB. No encoder sees as many."""
MAX_BYTES = 1 << 27
"""Of a picture's file."""
MAX_WEBP = 1 << 25
"""Pixels of a WebP, whose decoder holds each five times."""
MAX_EXIF = 64
"""Pieces (of 64 kB) of a JPEG's Exif data. Pillow joins them one by one: 2000 take a minute."""
MAX_SCANS = 32
"""Of a progressive JPEG. Encoders write about ten; each goes over the whole picture, and ten thousand take 26 s."""
MAX_SEGMENTS = 4096
"""Of a JPEG: scans, tables, and metadata in pieces of 64 kB."""
MAX_ASPECT = 50
"""Longest side over shortest. Encoders scale the short side to hundreds of pixels: a line of 1 x 60000 gets huge."""
# The marker of a JPEG's segment, or of its end; within scans these bytes are never data.
_MARKER = re.compile(rb"\xff[^\x00\x01\xff\xd0-\xd7]")


def read_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode a picture, its orientation applied and its transparency put on white.

    Returns:
        An image in mode RGB.

    Raises:
        BadSample: Not a picture of a known format, cut off, animated, or larger than the bounds.
    """
    if len(data) > MAX_BYTES:
        raise BadSample(f"a picture of {len(data)} bytes; at most {MAX_BYTES} are read")
    if data.count(b"Exif\0\0") > MAX_EXIF:
        raise BadSample(f"a picture with more than {MAX_EXIF} pieces of Exif data")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns about large headers; we refuse them
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = picture.size
            if width * height > max_pixels:
                raise BadSample(
                    f"a picture of {width} x {height} pixels; at most {max_pixels} are decoded (max_pixels)"
                )
            if picture.format == "WEBP" and width * height > MAX_WEBP:
                raise BadSample(f"a WebP of {width} x {height} pixels; at most {MAX_WEBP} are decoded")
            check_aspect(width, height)
            if picture.format in ("JPEG", "MPO"):
                _check_scans(data)
            if picture.format in ANIMATED and getattr(picture, "is_animated", False):
                raise BadSample(
                    f"an animated {picture.format}, of which an image would be the first frame alone; convert it to a "
                    "video (mp4, webm) or to a single picture"
                )
            if width * height > LARGE:
                picture = _reduced(picture)
            return _rgb(ImageOps.exif_transpose(picture))
    except BadSample:
        raise
    except Image.DecompressionBombError as error:  # Pillow's own bound, twice its MAX_IMAGE_PIXELS
        raise BadSample(f"a picture with too many pixels: {error}") from error
    except Exception as error:  # Pillow's decoders raise whatever their parsing stumbles over
        cause = "" if isinstance(error, UnidentifiedImageError) else f": {error}"
        raise BadSample(
            f"{len(data)} bytes that begin with {data[:12]!r} are no whole picture ({', '.join(FORMATS)}){cause}"
        ) from error


def _check_scans(data: bytes) -> None:
    """Refuse a JPEG of very many scans. What follows its end is not looked at: the film of a motion photo, for example.

    Raises:
        BadSample: It is one.
    """
    scans, position = 0, 2
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(data, position)
        if marker is None or marker[0] == b"\xff\xd9":
            return
        scans += marker[0] == b"\xff\xda"
        if scans > MAX_SCANS:
            raise BadSample(f"a JPEG of more than {MAX_SCANS} scans")
        position = marker.end() + int.from_bytes(data[marker.end() : marker.end() + 2])
    raise BadSample(f"a JPEG of more than {MAX_SEGMENTS} segments")


def _rgb(picture: Image.Image) -> Image.Image:
    """An image of any mode → one of mode RGB."""
    if picture.mode.startswith("I"):  # 16 bits a channel: convert() would clip it to white
        picture = picture.point(lambda value: value / 256).convert("L")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


def _reduced(picture: Image.Image) -> Image.Image:
    """A large image → one of mode RGB and at most `LARGE` pixels, each the mean of a square of the picture's."""
    width, height = picture.size
    factor = math.ceil(math.sqrt(width * height / LARGE))
    reduced = Image.new("RGB", (-(-width // factor), -(-height // factor)))
    rows = 64 * factor
    for top in range(0, height, rows):
        strip = picture.crop((0, top, width, min(top + rows, height)))
        reduced.paste(_rgb(strip).reduce(factor), (0, top // factor))
    if orientation := picture.getexif().get(ORIENTATION):
        reduced.getexif()[ORIENTATION] = orientation
    return reduced


def check_aspect(width: int, height: int) -> None:
    """Refuse a picture that is so long and thin that scaling its short side up would fill the memory.

    Raises:
        BadSample: It is, or it is empty.
    """
    if min(width, height) < 1 or max(width, height) > MAX_ASPECT * min(width, height):
        raise BadSample(f"a picture of {width} x {height} pixels; its sides may differ by a factor of {MAX_ASPECT}")
