"""Anybody's data → shards: programs that read a source and leave one folder of tars behind, or nothing.

`write` is the one writer of shards, and says what a sample is. `steps` has what the programs share. `negatives` makes
questions about what is not in a picture. `sources/` has a file for each format, `demo/` the data of ``make demo``.
"""
