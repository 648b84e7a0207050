"""What is saved, verified, resumed, joined and mixed; and how settings and a checkpoint become a model.

    Config + Registry ──build──▶ Built ◀── load ◀── checkpoint ◀── joined (several) ◀── mix (two, averaged)

1. `build`: the one place where settings, encoders, projectors, LLM and weights meet; it makes a `built.Built`. Read it
   first.
2. `checkpoint`: what is in one; how one is found, and written whole or not at all. `model_card`: its README.md.
3. `load`: projectors and LoRA into a model, each refused where it does not fit. `networks`: encoders and LLM that were
   trained. `state`: how far training had come, for a run that goes on.
4. `checksums`: verified before anything is loaded. `retention`: which are kept, and how leftovers go.
5. `joined`: modalities that were trained apart, as AnyMAL trains them. `mix`: the average of two.
6. `lock`: one run to a folder. `precision`: what a checkpoint does beside an LLM at other bits.

`process` is around every program: it leaves the process as it was. Only safetensors and JSON are loaded: nothing that
can execute.
"""
