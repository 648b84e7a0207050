"""Motion: accelerometer and gyroscope → features of a frozen IMU encoder.

`modality` decodes and encodes; `published` reads the networks of ImageBind, OneLLM and IMU2CLIP; `pretrain` is the
program that trains one of our own (`anymal.adapters.architectures.imu_encoder`), since none is published freely.
"""
