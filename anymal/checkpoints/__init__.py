"""What is saved, verified, resumed, joined and mixed; and how settings and a checkpoint become a model.

    Config + Registry ──build──▶ model ◀── checkpoint ◀── joined (several) ◀── mix (two, averaged)

1. `build`: the one place where settings, encoders, projectors, LLM and weights meet. Read it first.
2. `checkpoint`: what is in one, written whole or not at all. `networks`: encoders and LLM that were trained.
3. `checksums`: verified before anything is loaded. `retention`: which are kept, and how leftovers go.
4. `joined`: modalities that were trained apart, as AnyMAL trains them. `mix`: the average of two.
5. `lock`: one run to a folder. `precision`: what a checkpoint does beside an LLM at other bits.

Only safetensors and JSON: nothing that is loaded can execute.
"""
