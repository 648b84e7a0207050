"""The demo's linear probes: they find what is there, nothing where nothing is, and choose by validation alone."""

import torch

from demo_ceiling import Encoded, is_plausible, probe

LABELS = ["left", "right", "up"]


def _splits(signal: float, *, ordered: bool = False) -> dict[str, Encoded]:
    """Noise, 40 features wide, with a direction for each label; if `ordered`, its opposite is in the second token."""
    generator, found = torch.Generator().manual_seed(0), {}
    directions = torch.randn(3, 40, generator=generator)
    for name, n in {"train": 120, "validation": 60, "test": 300}.items():
        number = torch.arange(n) % 3
        features = torch.randn(n, 2, 40, generator=generator)
        features[:, 0] += signal * directions[number]
        features[:, 1] += -signal * directions[number] if ordered else 0
        found[name] = Encoded(features=features, labels=[LABELS[i] for i in number], sources=1)
    return found


def test_probes_find_what_features_hold():
    row = probe(_splits(1.0)) | {"trained": None}
    assert row["flattened"]["accuracy"] > 0.95 and row["averaged"]["accuracy"] > 0.9
    low, high = row["flattened"]["interval"]
    assert row["flattened"]["n"] == 300 and low < row["flattened"]["accuracy"] < high + 1e-9
    assert is_plausible("image", row, 1 / 3)


def test_an_average_knows_no_order():
    row = probe(_splits(1.0, ordered=True)) | {"trained": None}
    assert row["flattened"]["accuracy"] > 0.95 and row["averaged"]["accuracy"] < 0.5
    assert is_plausible("video", row, 1 / 3)
    assert not is_plausible("video", row | {"averaged": row["flattened"]}, 1 / 3)


def test_probes_of_noise_and_models_above_their_ceiling_are_noticed():
    assert not is_plausible("image", probe(_splits(0.0)) | {"trained": None}, 1 / 3)
    row = probe(_splits(0.3))
    assert not is_plausible("image", row | {"trained": {"interval": (0.999, 1.0)}}, 1 / 3)


def test_the_test_split_chooses_nothing():
    splits = _splits(0.3)
    turned = Encoded(features=splits["test"].features, labels=splits["test"].labels[::-1], sources=1)
    assert probe(splits | {"test": turned})["flattened"]["strength"] == probe(splits)["flattened"]["strength"]
