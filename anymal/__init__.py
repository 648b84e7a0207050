"""AnyMAL: eyes, ears and a sense of motion for a frozen language model.

The core of the pipeline. It names no modality: those live in ``adapters``.
"""

from anymal.environment import make_threads_yield, make_torchaudio_importable

make_threads_yield()  # before the first import of torch
make_torchaudio_importable()  # before the first import of transformers, which imports torchaudio unguarded
