"""Features in place of media: their bytes, whose they are, and batches of which a part is encoded already."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from anymal.adapters import REGISTRY
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import ModalityConfig
from anymal.data import feature_codec
from anymal.data.packing import pack
from anymal.errors import BadSample
from anymal.sample import Features, PartlyEncoded
from small_runs import ROOT
from tiny_encoders import clip, clip_vision
from toys import medium, sample, text, toy_model

KINDS = ["image", "imu"]


# ------------------------------------------------------------------------------------------------- bytes, identity


def test_float32_is_exact_and_the_others_within_their_bounds():
    exact = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 7)[:, None]
    exact[3] = 0
    assert torch.equal(feature_codec.load(feature_codec.dump(exact, "float32"), 7, 5), exact)
    assert torch.equal(feature_codec.load(feature_codec.dump(exact, "bf16"), 7, 5), exact.bfloat16())
    rounded = feature_codec.load(feature_codec.dump(exact, "int8"), 7, 5)
    bound = exact.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 1e-5)
    assert ((rounded - exact).abs() <= bound).all() and not torch.equal(rounded, exact)
    assert len(feature_codec.dump(torch.zeros(64, 512), "int8")) < 0.52 * len(
        feature_codec.dump(torch.zeros(64, 512), "bf16")
    )


GOOD = {"features": torch.zeros(3, 4)}
HOSTILE = {
    "no safetensors": (b"this is no such file", "not in safetensors' format"),
    "empty": (b"", "not in safetensors' format"),
    "cut": (save(GOOD)[:-3], "not in safetensors' format"),
    "another tensor": (save({"pixels": torch.zeros(3, 4)}), r"hold the tensors \['pixels'\]"),
    "another shape": (save({"features": torch.zeros(4, 3)}), r"\[4, 3\] of torch.float32; this encoder's are \[3, 4\]"),
    "another dtype": (save({"features": torch.zeros(3, 4, dtype=torch.int64)}), "of torch.int64"),
    "NaN": (save({"features": torch.full((3, 4), torch.nan)}), "NaN or infinite"),
    "no scale": (save({"features": torch.zeros(3, 4, dtype=torch.int8)}), "scale of cached features is none"),
    "bad scale": (
        save({"features": torch.ones(3, 4, dtype=torch.int8), "scale": torch.full((3,), torch.inf)}),
        "NaN or infinite",
    ),
    "scale's shape": (
        save({"features": torch.ones(3, 4, dtype=torch.int8), "scale": torch.ones(1, 3)}),
        r"\[1, 3\] of torch.float32; wanted is \[3\]",
    ),
    "far too large": (save({"features": torch.full((3, 4), 3e38)}), r"up to 3e\+38; at most 1e\+09"),
    "a bomb": (save({"bad": torch.zeros(10**6, dtype=torch.uint8)}), "of 1000080 bytes; .* at most 65596"),
    "a reason": (feature_codec.dump_bad("is no picture: ü"), "^is no picture: ü$"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_features_are_bad_samples(what):
    data, says = HOSTILE[what]
    with pytest.raises(BadSample, match=says):
        feature_codec.load(data, 3, 4)


def test_identity_changes_with_all_that_features_depend_on(tmp_path):
    def of(folder: Path, name: str = "image", **options) -> str:
        return feature_codec.identity(
            load_encoder(REGISTRY, name, ModalityConfig(encoder=str(folder), options=options))
        )

    clip(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "elsewhere")
    clip(tmp_path / "other-weights", seed=1)
    clip_vision(tmp_path / "other-architecture")
    shutil.copytree(tmp_path / "a", tmp_path / "other-processor")
    processor = json.loads((tmp_path / "a/preprocessor_config.json").read_text())
    (tmp_path / "other-processor/preprocessor_config.json").write_text(
        json.dumps(processor | {"image_mean": [0.5, 0.5, 0.5]})
    )
    same = of(tmp_path / "a")
    assert of(tmp_path / "elsewhere") == same == of(tmp_path / "a", layer=-2)
    encoder = load_encoder(REGISTRY, "image", ModalityConfig(encoder=str(tmp_path / "a")))
    assert feature_codec.identity(encoder.to(torch.bfloat16)) == same
    others = [of(tmp_path / f"other-{what}") for what in ("weights", "architecture", "processor")]
    others += [of(tmp_path / "a", layer=-1), of(tmp_path / "a", max_pixels=10), of(tmp_path / "a", "video")]
    others += [of(tmp_path / "a", "video", frames=8), of(tmp_path / "a", "video", pool=4)]
    assert len({same, *others}) == 1 + len(others)
    program = (
        "from anymal.adapters import REGISTRY; from anymal.checkpoints.build import load_encoder;"
        "from anymal.config.schema import ModalityConfig; from anymal.data import feature_codec;"
        f"encoder = ModalityConfig(encoder={str(tmp_path / 'a')!r});"
        "print(feature_codec.identity(load_encoder(REGISTRY, 'image', encoder)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split()[-1] == same


def test_a_batch_may_mix_media_and_features(tiny_llm):
    """The same rows, whichever media the encoders have yet to see."""
    model, prompt = toy_model(tiny_llm, image=3, audio=2)
    one = prompt.sample(sample(medium("image", 1), text("and"), medium("audio", 2), medium("image", 3), key="a"))
    two = prompt.sample(sample(medium("image", 4), medium("image", 5), key="b"))
    batch = pack([one, two])
    exact = model.encode(batch.media)
    whole, _ = model.logits(batch, exact)
    kinds = [run[0] for tokens in (one, two) for run in tokens.runs]
    rows = {kind: iter(exact[kind]) for kind in exact}
    known = [next(rows[kind]) for kind in kinds]
    raw = [medium for tokens in (one, two) for medium in tokens.media]
    for chosen in itertools.product([False, True], repeat=5):
        media = [Features(tensor=k) if use else r for k, r, use in zip(known, raw, chosen, strict=True)]
        one.media, two.media = media[:3], media[3:]
        mixed = pack([one, two]).to("cpu")
        assert isinstance(mixed.media["image"], PartlyEncoded) == any(chosen[i] for i in (0, 2, 3, 4))
        assert all(torch.equal(model.encode(mixed.media)[kind], exact[kind]) for kind in exact)
        assert torch.equal(model.logits(mixed, model.encode(mixed.media))[0], whole)
    assert mixed.media["image"].raw is None  # with all of them known no encoder runs
