"""Shards → batches, endlessly, from any place, the same for any number of workers and ranks.

    order ─▶ shards ─▶ loader (workers: parse ─▶ decode ─▶ prompt) ─▶ packing ─▶ Batch + bookmark
    which    where     what it says, as token ids and media           a row      where the stream stands

In the order in which it happens; read `stream` first, which puts it together:

1. `manifest`: how many samples each tar holds, without opening it; `remote` and `object_store` download tars that are addresses.
2. `order`: position → dataset, epoch, shard, sample. Closed form, so a bookmark is a few numbers.
3. `shards`: the byte range of each sample; `feature_cache` finds a twin that holds features in place of media.
4. `loader`, on `pool`: worker processes that read, `parse`, decode and tokenise (`prompt`, with `budget` for views).
   A crash of a decoder costs one sample. Sequence packing, `packing`, puts samples end to end in one row.
5. `quarantine`: bad samples are counted, named, and stop the run when there are too many.

`feature_codec` is how features stand in a shard. All randomness comes from (seed, position): no worker keeps state.
"""
