"""What `gpu_check.py` measures, a file a kind of stage.

- `measure`: sizes, time, goals and the line that each stage ends in. Imports torch alone.
- `probe`: the machine itself. Imports torch alone.
- `kernels`: attention, norms, products with nf4 weights.
- `models`: LLMs and encoders at their real sizes, with random weights.
- `steps`: stage 1 at 8B and 70B, with the real prefetcher, and the estimate beside it.
- `engine`: DeepSpeed and the real loop: what the host reads, what it waits for, what a resumed run repeats.
- `programs`: the commands, end to end, on tiny models.
"""
