"""AnyMAL: eyes, ears and a sense of motion for a frozen language model.

    anybody's data ──data_prep──▶ tar shards ──data──▶ samples ──▶ token ids + media
                                                                         │
    text ◀──serving, evaluation── LLM (4/8 bits, frozen, LoRA) ◀──splice─┤
                                    ▲                                    │
                                    └─ projector (trained) ◀─ encoder (frozen)

One room a concern, each with a page that says what happens in it. Imports point down this list, never up
(import-linter says so in ``make check``):

    launch        what people start: an entry point for each program, recipes
    doctor        what this machine has, and what to do about what is missing
    data_prep     anybody's data → shards
    adapters      the modalities (image, video, audio, imu) and the projectors
    serving       answer people: one prompt, a conversation, drawing
    estimation    what a run will take: memory, FLOPs, time, cost, from shapes alone
    features      encode once: the program that fills the feature cache
    training      run, loop, engine, prefetch, recovery, tracking
    evaluation    held-out sets, controls, metrics, reports
    checkpoints   what is saved, verified, resumed, joined, mixed; settings + checkpoint → model
    model         encode, project, splice, LLM, loss; attention, generation
    data          order → shards → loader → parse → prompt → packing → Batch, with a bookmark
    config        every setting and its default; YAML and overrides; --help

The files beside this one are what all rooms share: `sample` (the values that travel from a shard to the loss) and
`modality` (what a modality must have), `files`, `errors`, `signals` and `environment`. ``launch``, ``data_prep`` and
``adapters`` are folders next to this one, linked into it, so that everything has one import name. What stands below
``adapters`` names no modality: it is handed an `anymal.model.registry.Registry`.

To read on: CONTRIBUTING.md follows one sample through the files; docs/glossary.md maps the field's words, and ours, to
them.
"""

from anymal.environment import make_threads_yield, make_torchaudio_importable, put_cudnn_attention_last

__version__ = "0.1.0"

make_threads_yield()  # before the first import of torch
put_cudnn_attention_last()  # before the first attention on a GPU
make_torchaudio_importable()  # before the first import of transformers, which imports torchaudio unguarded
