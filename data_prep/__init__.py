"""Anybody's data → shards: programs that read a source and leave one folder of WebDataset tars behind, or nothing.

    a source ──reader──▶ samples as dicts ──write──▶ FOLDER/000000.tar, … ──▶ anymal.data

1. `write`: the one writer of shards; says what a sample is. Read it first.
2. `sources/`: readers of other people's formats, a file each (`llava`).
3. `negatives`: yes/no questions about what is and what is not in a picture (POPE's). `objects`: names of objects:
   plurals and synonyms.
4. `steps`: worker processes. `demo/`: the models and data of ``make demo``.

Each program reads ``name=value`` settings (``--help`` lists them), has a function `start` for the console script, and
does nothing where its output is already there.
"""
