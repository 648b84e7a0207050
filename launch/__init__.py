"""What people start: an entry point for each program, a screen each; recipes/ states runs.

`command.py` is the console script `anymal`: ``anymal pretrain …`` does what ``python launch/pretrain.py …`` does, which
``deepspeed`` and ``torchrun`` start (without a checkout: ``--module anymal.launch.pretrain``). Each entry point holds
its program's help, hands the core what it may name (`registry.py`: our modalities and projectors, and those of other
distributions), and runs the ``main`` of a room. It imports when it is started, not before: signals come first, and
processes that are spawned import the program anew.
"""
