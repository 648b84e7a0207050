"""The modalities: one file or folder each, and one line each in `FILES`; and the projectors.

    bytes ──decode (loader worker)──▶ medium ──encoder (frozen)──▶ features ──projector (trained)──▶ embeddings

1. `audio`: the shortest modality that is whole. Read it first.
2. `image`, `video`, `imu`: a folder each, with a page of its own.
3. `projectors`: a file for each family. They know nothing of modalities.
4. `pretrained`: loads and saves encoders through transformers. `architectures`: networks that transformers lacks.
   `state_dicts`: weights under their authors' names, without unpickling.
5. `signals`: resampling and cropping, for audio and IMU. `pooling`: averages over features, of clips and projectors.

`REGISTRY` is what `anymal.launch` hands the core, with what other distributions add.

Heavy libraries (av, soundfile, torchaudio, transformers) are imported by the functions that use them, and for type
annotations under ``TYPE_CHECKING``: listing the modalities costs nothing to those who do not use them.
"""

from importlib import import_module

from anymal.adapters.projectors import PROJECTORS
from anymal.modality import Modality
from anymal.model.registry import Registry

FILES = [
    "image.modality",
    "video.modality",
    "audio",
    "imu.modality",
]
"""The modules of this package that make a modality: a new one adds its line here, and nothing anywhere else."""

MODALITIES: dict[str, Modality] = {
    modality.name: modality for modality in (import_module(f"anymal.adapters.{file}").MODALITY for file in FILES)
}
"""Every modality by name."""

REGISTRY = Registry(modalities=MODALITIES, projectors=PROJECTORS)
"""Ours alone; `anymal.launch.registry` has those of other distributions too."""
