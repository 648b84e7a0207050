"""What is saved, verified, resumed, joined and mixed; and how settings and a checkpoint become a model.

    Config + Registry ──build──▶ Built ◀── load ◀── checkpoint ◀── joined (several) ◀── mix (two, averaged)

1. `build`: the one place where settings, encoders, projectors, LLM and weights meet. Read it first. It returns a
   `built.Built`.
2. `checkpoint`: the files of a checkpoint; how one is found, and written whole or not at all. `model_card`: its
   README.md.
3. `load`: puts projectors and LoRA into a model, and refuses what does not fit. `networks`: encoders and LLM that were
   trained. `state`: how far training had come, for a run that goes on.
4. `checksums`: SHA-256 of every file, verified before anything is loaded. `retention`: which checkpoints are kept.
5. `joined`: several checkpoints, one for each modality, as AnyMAL trains them. `mix`: the weighted average of two.
6. `lock`: one run to a folder. `precision`: what was measured with the LLM at other bits.

`process` wraps every program's main: it leaves the process as it was. Only safetensors and JSON are loaded:
nothing that can execute.
"""
