"""Networks that transformers lacks: importing a file registers its network, so that AutoModel loads folders of it.

`imu_encoder`: our own small IMU encoder. `efficientnet_lite`: the demo's image encoder.
"""
