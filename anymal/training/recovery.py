"""A step whose loss or gradient is not finite (NaN or infinite): find the samples that cause it, go on without them.

A finite sound can have a spectrogram that is not finite, and an encoder may overflow on some medium. Such a sample
is as bad as one that does not decode; it only shows here. Nothing of the step was applied
(`anymal.training.engine.step`). The stream goes back to where the step began, the step's samples are run one by one,
and those whose own loss or gradient is not finite are bad samples from then on. The run is then the same as one
in which they were bad from the start.
"""

from itertools import islice

import torch

from anymal.data.packing import Item, Row
from anymal.data.stream import Stream, merge_bookmarks
from anymal.errors import UserError
from anymal.model.llm import set_frozen_mode
from anymal.model.multimodal import AnyMAL
from anymal.model.trainable import trainable
from anymal.training.prefetch import Prefetcher
from anymal.training.ranks import gather

_NAMED = 10  # samples that a message names


def refuse_nonfinite(model: AnyMAL, stream: Stream, bookmark: dict, *, micro_batches: int, step: int) -> str:
    """Have the stream refuse the samples that make a step not finite, and go back to where the step began.

    With several processes all must call it.

    Args:
        model: As it was when the step was tried.
        stream: This rank's; iterate anew afterwards.
        bookmark: This rank's piece of the bookmark before the step.
        micro_batches: How many the step has on this rank.
        step: Its number, counted from 1, for messages.

    Returns:
        Which samples were refused and why, for the user.

    Raises:
        UserError: It is not the samples: each is finite alone, or none is.
    """
    merged = merge_bookmarks(gather(bookmark))
    stream.rewind(merged)
    items = [item for row in islice(stream, micro_batches) for item in row.items]
    ranks = gather({"keys": [item.tokens.key for item in items], "bad": _not_finite(model, items)})
    keys = [key for rank in ranks for key in rank["keys"]]
    bad = [one for rank in ranks for one in rank["bad"]]
    if not bad or len(bad) == len(keys) > 1:
        alone = "no sample's is so alone" if not bad else "each sample's is so alone"
        named = ", ".join(keys[:_NAMED]) + (f" and {len(keys) - _NAMED} more" if len(keys) > _NAMED else "")
        raise UserError(
            f"the loss of step {step}, or its gradient, is not finite, and {alone}; nothing of this step was applied. "
            f"Lower optim.lr, or look at the samples {named}"
        )
    stream.refuse({position: reason for position, _, reason in bad})
    stream.rewind(merged)
    named = ", ".join(f"{key} ({reason})" for _, key, reason in bad[:_NAMED])
    return f"step {step} is done without {len(bad)} of its samples: {named}"


def _not_finite(model: AnyMAL, items: list[Item]) -> list[tuple[int, str, str]]:
    """Position, key and reason of each sample whose loss, alone in a row, is not finite, or has such a gradient."""
    bad = []
    model.eval()
    prefetcher = Prefetcher(model)  # one: each has a CUDA stream, and a pool of memory, of its own
    set_frozen_mode(model.llm, recompute=True)  # a long sample may not fit without what checkpointing saves
    # A sharded model runs only where all ranks run it: those with fewer samples run their last one again.
    for number in range(max(gather(len(items)))):
        item = items[min(number, len(items) - 1)]
        reason = _fault(model, prefetcher, item)
        if reason and number < len(items):
            bad.append((item.position, item.tokens.key, reason))
    model.train()
    return bad


def _fault(model: AnyMAL, prefetcher: Prefetcher, item: Item) -> str:
    """What is not finite about a sample; empty if nothing is."""
    learns = list(trainable(model).values())
    sharded = hasattr(learns[0], "ds_id")  # by ZeRO-3, whose parameters are whole for the moment of a layer only
    prefetcher.start(Row(items=[item]))
    with torch.set_grad_enabled(not sharded):
        total, _ = model(*prefetcher.take())
    if not torch.isfinite(total):
        return f"its loss is {total.item()}, which is not finite"
    if sharded:
        return ""
    gradients = [g for g in torch.autograd.grad(total, learns, allow_unused=True) if g is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    return "" if torch.isfinite(norm) else "the gradient of its loss is not finite"
