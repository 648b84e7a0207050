"""Train the IMU encoder on labelled windows, once, so that stage 1 has one.

    anymal pretrain-imu-encoder shards=data/imu/train eval_shards=data/imu/validation out=models/imu
    anymal pretrain-imu-encoder shards='imu/{000..015}.tar' rate=200 out=models/imu-200hz steps=2000 width=256

None is published. Shards hold ``imu.npy`` (float array [samples, 6]: accelerometer with gravity, gyroscope) and
``json`` with a ``label``. The encoder (`anymal.adapters.architectures.imu_encoder`) learns to tell the labels apart
through a linear layer on the mean of its features; that layer is dropped. Bad samples are skipped and named in
``OUT.skipped.jsonl``; a share of more than a tenth ends it. `out` becomes a folder that
``model.modalities.imu.encoder`` takes. The encoder has seen these labels, so a projector that is trained to name them
mostly translates: its README says so, and so should you.

Runs in one process, on the GPU if there is one; 300 steps take 17 s of one CPU core, start included.
"""


def start() -> None:
    """Run the program, for the command line."""
    from anymal.adapters.imu.pretrain import main
    from anymal.config.command_line import run_program

    run_program(lambda: main(__doc__))


if __name__ == "__main__":
    start()
