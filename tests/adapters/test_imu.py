"""IMU: recordings in their units, bad ones are refused; an encoder is trained and loads."""

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny_encoders as tiny
from anymal.adapters.imu.modality import IMUOptions, load_imu_encoder, read_recording
from anymal.config.settings import options
from anymal.errors import BadSample, BudgetExceeded, UserError
from tiny_encoders import decoded, motion, npy


def test_channels_are_standardised(tmp_path):
    from anymal.adapters.architectures.imu_encoder import IMUEncoderConfig, IMUEncoderModel

    config = IMUEncoderConfig(seconds=1.0, hidden_size=16, mean=[0, 0, 9.81, 0, 0, 0], std=[2.0] * 6)
    IMUEncoderModel(config).save_pretrained(tmp_path)
    window = load_imu_encoder(str(tmp_path), IMUOptions(rate=50)).decode(npy(motion(50)))
    expected = (torch.from_numpy(motion(50)).T - torch.tensor([0, 0, 9.81, 0, 0, 0])[:, None]) / 2
    assert torch.allclose(window, expected, atol=1e-5)


def test_recordings_are_resampled_cropped_and_held(tmp_path):
    folder = tiny.imu(tmp_path)
    decode = load_imu_encoder(folder, IMUOptions(rate=50)).decode
    recording = motion(200)
    longer, short = decode(npy(recording)), decode(npy(recording[:30]))
    assert torch.equal(longer.tensor, decode(npy(recording[75:125]))), "the middle of a longer one"
    assert longer.note == "cropped to the middle 1 s"
    held = short.tensor
    assert torch.equal(held[:, 30:], held[:, 29:30].expand(-1, 20)), "the last value of a shorter one is held"
    assert short.note == "filled up to 1 s with the last value"
    with pytest.raises(BadSample, match=r"24 samples, 0.48 s at 50 Hz; wanted is a window of 1 s, or at least half"):
        decode(npy(recording[:24]))
    time = np.arange(200)[:, None] / 200
    fast = (np.sin(2 * np.pi * 2 * time) + np.array([[0, 0, 9.81, 0, 0, 0]])).astype("float32")
    slow = decode(npy(fast[::4]))
    assert (decoded(load_imu_encoder(folder, IMUOptions(rate=200)).decode, npy(fast)) - slow)[
        :, 5:45
    ].abs().max() < 0.02


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_any_float_is_taken(dtype):
    recording = read_recording(npy(motion().astype(dtype)), 1000)
    assert (recording.dtype, recording.shape) == (np.float32, (50, 6))


def test_bad_recordings_are_named():
    def refused(data, match, most=1000):
        with pytest.raises(BadSample, match=match):
            read_recording(data, most)

    refused(npy(motion().T.copy()), r"\[6, 50\] of float32; wanted is .*; transpose it")
    refused(npy(motion()[:, :3].copy()), r"\[50, 3\] of float32; wanted is a float array \[samples, 6\]")
    refused(npy(motion().astype("int16")), "of int16; wanted is a float array")
    refused(npy(np.zeros((0, 6), "float32")), "0 samples; wanted are 1 to 1000")
    refused(npy(motion(50)), "50 samples; wanted are 1 to 40", most=40)
    broken = motion()
    broken[3, 2] = np.nan
    refused(npy(broken), "1 of 300 values are NaN or infinite")
    degrees = motion()
    degrees[:, 3:] *= 180
    refused(npy(degrees), "degrees per second")
    refused(npy(motion())[:-8], "it is cut off")
    huge = npy(motion()).replace(b"(50, 6), }          ", b"(500000000000, 6), }")
    refused(huge, "500000000000 samples; wanted are 1 to 1000")


def test_units_are_converted(tmp_path):
    folder, recording = tiny.imu(tmp_path), motion(50)
    others = recording / np.array([9.80665] * 3 + [np.pi / 180] * 3, np.float32)
    decode = load_imu_encoder(folder, IMUOptions(rate=50, acceleration="g", rotation="deg/s")).decode
    expected = load_imu_encoder(folder, IMUOptions(rate=50)).decode(npy(recording))
    assert torch.allclose(decode(npy(others)), expected, atol=1e-5)
    with pytest.raises(UserError, match=r"imu\.options: acceleration is 'mg'; it can be m/s2 or g; did you mean g\?"):
        options(IMUOptions, {"acceleration": "mg"}, "imu.options")


def test_acceleration_in_another_unit_than_stated_is_refused():
    def shaken(amplitude: float, gravity: float) -> np.ndarray:
        recording = amplitude * motion(250)
        recording[:, 2] += gravity - amplitude * 9.81
        return recording

    with pytest.raises(
        BadSample, match=r"reads 1\.\d\d in one direction: that is gravity in g, .* option acceleration=g"
    ):
        read_recording(npy(shaken(0.2, 1.0)), 1000)
    with pytest.raises(BadSample, match=r"median is 9\d\.\d+ m/s², .* as the imu option acceleration says"):
        read_recording(npy(shaken(1.0, 9.81)), 1000, scale=(9.80665, 1.0))
    for good in (shaken(5.0, 9.81), shaken(1.0, 0.0), shaken(0.1, 0.0), np.zeros((250, 6), np.float32)):
        read_recording(npy(good), 1000)  # hard shaking; without gravity; at rest without gravity; falling freely


def test_fortran_order_is_understood():
    assert np.array_equal(read_recording(npy(np.asfortranarray(motion())), 1000), motion())


def test_the_rate_must_be_stated(tmp_path):
    with pytest.raises(UserError, match=r"imu.options.rate must state .* takes 50 Hz"):
        load_imu_encoder(tiny.imu(tmp_path), IMUOptions())


def test_an_image_encoder_is_no_imu_encoder(tmp_path):
    with pytest.raises(UserError, match="holds a dinov2, not an IMU encoder"):
        load_imu_encoder(tiny.dinov2(tmp_path), IMUOptions(rate=50))


def _imu_shard(path, count, seed, *, bad=True):
    """Two kinds of motion that can be told apart; with `bad` one sample without a label, one that is a pickle."""
    import webdataset as wds

    rng = np.random.default_rng(seed)
    with wds.TarWriter(str(path), encoder=False) as writer:
        for i in range(count):
            time = np.arange(50)[:, None] / 50 + rng.random()
            wave = np.sin(2 * np.pi * (1 + 3 * (i % 2)) * time) * np.ones((1, 6))
            data = npy((wave + 0.1 * rng.standard_normal((50, 6))).astype("float32"))
            label = json.dumps({"label": ("slow", "fast")[i % 2]}).encode()
            writer.write({"__key__": f"{i:04d}", "imu.npy": data, "json": label})
        if not bad:
            return path
        writer.write({"__key__": "nameless", "imu.npy": npy(motion()), "json": b"{}"})
        pickled = npy(np.array([{}], dtype=object), allow_pickle=True)
        writer.write({"__key__": "pickled", "imu.npy": pickled, "json": b'{"label": "slow"}'})
    return path


def test_imu_encoder_is_trained_and_loads(tmp_path, capsys):
    from anymal.adapters.imu.pretrain import IMUTraining, main, run

    _imu_shard(tmp_path / "train.tar", 64, 0)
    _imu_shard(tmp_path / "test.tar", 32, 1)
    out = tmp_path / "models" / "imu"
    settings = IMUTraining(
        shards=str(tmp_path / "train.tar"),
        eval_shards=str(tmp_path / "test.tar"),
        out=str(out),
        seconds=1.0,
        width=16,
        blocks=1,
        steps=40,
        batch_size=16,
        lr=1e-2,
    )
    assert run(settings) > 0.9
    assert "skipped 2 bad samples of 66" in capsys.readouterr().out
    log = out.parent / "imu.skipped.jsonl"
    named = [json.loads(line)["key"] for line in log.read_text().splitlines()]
    assert named == ["nameless", "pickled"] * 2, "of the training windows, and of the held-out ones"
    assert "with their labels** (fast, slow)" in (out / "README.md").read_text()
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert sorted(path.name for path in out.parent.iterdir()) == ["imu", log.name], "nothing temporary is left"
    encoder = load_imu_encoder(str(out), IMUOptions(rate=50))
    window = decoded(encoder.decode, npy(motion()))
    assert encoder(window[None]).shape == (1, 7, 16)
    before = (out / "model.safetensors").read_bytes()
    main("", [f"shards={tmp_path / 'train.tar'}", f"out={out}"])
    assert "is there already" in capsys.readouterr().out
    assert (out / "model.safetensors").read_bytes() == before


def test_imu_training_heeds_what_the_index_says(tmp_path, capsys):
    """A window of which the index says that it may lack members is as bad as one that does not decode."""
    from anymal.adapters.imu.pretrain import IMUTraining, run

    _imu_shard(tmp_path / "a.tar", 40, 0)
    whole = _imu_shard(tmp_path / "b.tar", 40, 1, bad=False).read_bytes()
    with tarfile.open(tmp_path / "b.tar") as tar:
        last = tar.getmembers()[-1]
    (tmp_path / "b.tar").write_bytes(whole[: last.offset_data + 512])  # all members are whole; the end mark is gone
    (tmp_path / "c.tar").write_text("no tar\n" * 100)
    settings = {"out": str(tmp_path / "out"), "seconds": 1.0, "width": 16, "blocks": 1, "steps": 2}
    run(IMUTraining(shards=str(tmp_path), **settings))
    log = tmp_path / "out.skipped.jsonl"
    assert f"skipped 4 bad samples of 83 in training windows, see {log}" in capsys.readouterr().out
    named = [json.loads(line) for line in log.read_text().splitlines()]
    assert [(Path(one["shard"]).name, one["key"]) for one in named] == [
        ("c.tar", ""),
        ("a.tar", "nameless"),
        ("a.tar", "pickled"),
        ("b.tar", "0039"),
    ]
    assert "is not a tar" in named[0]["reason"] and "the tar is cut" in named[3]["reason"]
    assert "on 79 windows" in (tmp_path / "out" / "README.md").read_text()
    many = [tmp_path / f"none-{i:02d}.tar" for i in range(21)]
    for path in many:
        path.touch()
    settings["out"] = str(tmp_path / "another")
    with pytest.raises(BudgetExceeded, match="21 in a row"):
        run(IMUTraining(shards=[str(tmp_path / "a.tar"), *map(str, many)], **settings))


def test_imu_training_refuses_what_it_cannot_learn_from(tmp_path):
    from anymal.adapters.imu.pretrain import IMUTraining, run

    with pytest.raises(UserError, match="there is no shard"):
        run(IMUTraining(shards=str(tmp_path / "none.tar"), out=str(tmp_path / "out")))
    _imu_shard(tmp_path / "train.tar", 1, 0)
    with pytest.raises(UserError):
        run(IMUTraining(shards=str(tmp_path / "train.tar"), out=str(tmp_path / "out"), seconds=1.0))
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="width a multiple of 16"):
        IMUTraining(shards="x", out="y", width=100)
