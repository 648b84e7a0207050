"""Images: a picture's bytes → pixels → patch features of one frozen vision encoder, or of several.

1. `read`: bytes → picture, within bounds. `modality`: one encoder, its decoding, views of large pictures (`tiles`).
2. `mixture`: a composition of encoders (channels, append), each a leaf in `backbone`, which take `pictures` as they
are.
"""
