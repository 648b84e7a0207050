"""Shards → rows, endlessly, from any position, the same for any number of workers and ranks.

    order ─▶ shards ─▶ loader (workers: parse ─▶ prepare ─▶ prompt) ─▶ packing ─▶ Row + bookmark
    which    where     what it says, as token ids and media            a row      the dataloader's state

In the order in which it happens; read `stream` first, which puts it together:

1. `listing`: the tars that a recipe names. `manifest`: how many samples each holds, without opening it, from
   `index_files`. `remote` and `object_store` download tars that are addresses.
2. `order`: position → dataset, epoch, shard, sample. Closed form, so a bookmark is a few numbers. Each data-parallel
   rank has its `RankSampler`.
3. `shards`: the byte range of each sample; `feature_cache` finds the tar that holds features in place of media.
4. `loader`: worker processes (`pool`) prefetch: they read, `parse`, decode (`prepare`) and tokenise (`prompt`, with
   `view_budget` for media in views). A crash of a decoder costs one sample.
5. `packing`: sequence packing puts samples end to end in one row; `pack` collates it to a `Batch` when its turn comes.
6. `quarantine`: bad samples are counted, named, and stop the run when there are too many.

`feature_codec` is how features are stored in a tar. All randomness comes from (seed, position): no worker keeps state.
"""
