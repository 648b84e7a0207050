"""Encode once, train many times: fills the feature cache that `anymal.data.feature_cache` finds and reads.

    tar ──decode──▶ frozen encoder ──▶ features ──feature_codec──▶ FOLDER/features/IDENTITY.PRECISION/NAME.tar

1. `encode`: the program: processes on any number of machines share the work, tar by tar. Read it first.
2. `decode`: what its loader workers do with a sample.
3. `report`: how exact the cached features are, and whether reading them pays.
"""
