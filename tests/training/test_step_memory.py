"""What a micro-batch leaves behind while the next one is trained on: nothing that takes memory."""

import weakref
from typing import Any

from anymal.model.multimodal import AnyMAL
from small_runs import make_encoders, pretrain_here, settings, write_pairs


def test_a_micro_batch_keeps_neither_its_graph_nor_its_media(tiny_llm, tmp_path, monkeypatch):
    """At 8 bits bitsandbytes hangs every layer's input onto the graph; encoders that learn take media in the step."""
    totals: list[weakref.ref] = []
    batches: list[Any] = []

    def forward(model: AnyMAL, batch: Any, features: Any) -> Any:
        assert not [total for total in totals if total() is not None], "an earlier loss, and with it its graph"
        assert not any(earlier.media for earlier in batches)
        assert batch.media, "those of the encoder that learns"
        total, per_group = whole(model, batch, features)
        totals.append(weakref.ref(total))
        batches.append(batch)
        return total, per_group

    whole = AnyMAL.forward
    monkeypatch.setattr(AnyMAL, "forward", forward)
    encoders, pairs = make_encoders(tmp_path / "encoders"), write_pairs(tmp_path / "pairs", ["imu"])
    more = {"optim__steps": 2, "optim__gradient_accumulation": 2, "model__llm__bits": 8}
    given = settings(tiny_llm, encoders, tmp_path / "run", pairs, ["imu"], **more)
    pretrain_here(None, *given, "train=[projectors,encoders.imu]")
    assert len(totals) == 4
