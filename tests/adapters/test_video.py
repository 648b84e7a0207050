"""Video: features of clips, by an image encoder frame after frame or by VideoMAE; decoding in workers."""

import pytest
import torch
from PIL import Image

import tiny_encoders as tiny
from anymal.adapters.image.modality import ImageOptions, load_image_encoder
from anymal.adapters.video.frames import read_frames
from anymal.adapters.video.modality import VideoOptions, load_video_encoder
from anymal.errors import UserError
from tiny_encoders import clip_bytes


def test_an_image_encoder_sees_frame_after_frame(tmp_path):
    folder, data = tiny.efficientnet_lite(tmp_path), clip_bytes(20)
    encoder, of_image = load_video_encoder(folder, VideoOptions(frames=3)), load_image_encoder(folder, ImageOptions())
    clip = encoder.decode(data)
    assert clip.shape == (3, 3, 64, 64)
    features = encoder(torch.stack([clip, clip.flip(0)]))
    assert features.shape == (2, 12, 1280)
    expected = of_image(clip)
    assert torch.allclose(features[0], expected.flatten(0, 1), atol=1e-5)
    assert torch.allclose(features[1], expected.flip(0).flatten(0, 1), atol=1e-5)
    pooled = load_video_encoder(folder, VideoOptions(frames=3, pool=1))
    assert torch.allclose(pooled(clip[None])[0], expected.mean(1), atol=1e-5)


def test_videomae_gets_its_own_number_of_frames(tmp_path):
    from transformers import VideoMAEModel

    folder = tiny.videomae(tmp_path)
    encoder = load_video_encoder(folder, VideoOptions())
    clip = encoder.decode(clip_bytes(20))[None]
    frames = [Image.fromarray(frame) for frame in read_frames(clip_bytes(20), 4, 10, 10**6)]
    with torch.no_grad():
        expected = VideoMAEModel.from_pretrained(folder)(tiny.processed(folder, *frames)).last_hidden_state
    assert torch.allclose(encoder(clip), expected, atol=1e-6)
    pooled = load_video_encoder(folder, VideoOptions(pool=1))
    assert torch.allclose(pooled(clip), expected.unflatten(1, (2, 16)).mean(2), atol=1e-6)
    with pytest.raises(UserError, match="takes 4"):
        load_video_encoder(folder, VideoOptions(frames=8))
    with pytest.raises(UserError, match="square number"):
        VideoOptions(pool=3)
    with pytest.raises(UserError, match="pool is 25"):
        load_video_encoder(folder, VideoOptions(pool=25))


class _Clips(torch.utils.data.Dataset):
    def __init__(self, decode, data):
        self.decode, self.data = decode, data

    def __len__(self):
        return 4

    def __getitem__(self, _):
        return self.decode(self.data)


def test_clips_are_decoded_in_forked_workers(tmp_path):
    data = clip_bytes(20)
    decode = load_video_encoder(tiny.efficientnet_lite(tmp_path), VideoOptions(frames=2)).decode
    decode(data)  # in the parent first: what a reader leaves behind must not hang the children
    loader = torch.utils.data.DataLoader(_Clips(decode, data), 2, num_workers=2, timeout=60)
    assert [len(batch) for batch in loader] == [2, 2]
