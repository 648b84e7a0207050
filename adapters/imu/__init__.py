"""Motion: accelerometer and gyroscope → features of a frozen IMU encoder.

    bytes ──read_recording──▶ m/s², rad/s ──resample, crop, standardise──▶ window [6, S] ──encoder──▶ features

1. `modality`: decoding and encoding. Read it first.
2. `published`: the networks of ImageBind, OneLLM and IMU2CLIP, from their authors' files.
3. `pretrain`: the program that trains our own (`anymal.adapters.architectures.imu_encoder`), since none is published
   freely.
"""
