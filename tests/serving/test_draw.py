"""Drawing: what an answer asks for, and a real diffusers pipeline with tiny random weights that draws it."""

import json
import sys

import pytest
import torch
from PIL import Image

import anymal  # noqa: F401  (makes torchaudio importable before diffusers imports transformers)
from anymal.errors import UserError
from anymal.serving.chat import print_and_draw
from anymal.serving.draw import Painter, split


@pytest.mark.parametrize(
    ("answer", "reply", "prompts"),
    [
        ("A cat.", "A cat.", []),
        ("  two  blanks ", "  two  blanks ", []),  # without tags the answer is the reply, to the letter
        ("", "", []),
        ("Here: <h>a red cat</h> done.", "Here: done.", ["a red cat"]),
        ("<h> a\ncat </h>", "", ["a\ncat"]),
        ("<h>one</h> and <h>two</h>", "and", ["one", "two"]),
        ("<h>one</h><h>one</h>", "", ["one", "one"]),
        ("Nothing <h> </h><h></h>here", "Nothing here", []),
        ("cut <h>a cat on a", "cut <h>a cat on a", []),
        ("cut</h> short", "cut</h> short", []),
        ("<h>a</h> and <h>b", "and <h>b", ["a"]),
        ("<h>out <h>in</h> side</h>", "<h>out side</h>", ["in"]),
        ("<H>a</H> &lt;h>", "<H>a</H> &lt;h>", []),
    ],
)
def test_what_stands_between_the_tags_is_a_prompt(answer, reply, prompts):
    assert split(answer) == (reply, prompts)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> str:
    """The folder of a Stable Diffusion pipeline with random weights, as `save_pretrained` writes it."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("diffusion")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    text = CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1,
        pad_token_id=len(vocabulary) - 1,
    )
    narrow = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    crossed = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    made = StableDiffusionPipeline(
        vae=AutoencoderKL(latent_channels=4, **blocks, **narrow),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77),
        unet=UNet2DConditionModel(sample_size=16, cross_attention_dim=16, attention_head_dim=2, **crossed, **narrow),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.save_pretrained(folder / "pipeline")
    return str(folder / "pipeline")


def painter(name: str, **settings: int) -> Painter:
    return Painter(name=name, device=torch.device("cpu"), **{"steps": 2, "size": 32} | settings)


def test_prompts_become_png_files_that_follow_the_seed(pipeline, tmp_path):
    one, two = painter(pipeline).draw(["a red cat", "a red cat"], tmp_path / "out")
    assert [path.name for path in (one, two)] == ["0000.png", "0001.png"]
    with Image.open(one) as picture:
        assert (picture.format, picture.size, picture.mode) == ("PNG", (32, 32), "RGB")
        assert len(picture.getcolors(32 * 32)) > 10, "not a blank"
    assert one.read_bytes() != two.read_bytes(), "the second prompt starts from other noise"
    (again,) = painter(pipeline).draw(["a red cat"], tmp_path / "out")
    assert again.name == "0002.png" and again.read_bytes() == one.read_bytes(), "and nothing is overwritten"
    (other,) = painter(pipeline, seed=1).draw(["a red cat"], tmp_path / "other")
    assert other.read_bytes() == two.read_bytes()
    (prompted,) = painter(pipeline).draw(["the sea"], tmp_path / "other")
    assert prompted.read_bytes() != one.read_bytes()


def test_chat_says_where_the_pictures_are(pipeline, tmp_path, capsys):
    print_and_draw("Here you are: <h>a cat</h> Anything else?", painter(pipeline), tmp_path)
    assert capsys.readouterr().out == f"Here you are: Anything else?\ndrawn: {tmp_path / '0000.png'} (a cat)\n"
    assert (tmp_path / "0000.png").is_file()
    print_and_draw("<h>as it is</h>", None, tmp_path)
    assert capsys.readouterr().out == "<h>as it is</h>\n"


def test_an_answer_stands_though_it_cannot_be_drawn(tmp_path, capsys):
    with pytest.raises(UserError, match="does not load"):
        print_and_draw("Words. <h>a cat</h>", painter(str(tmp_path)), tmp_path / "out")
    assert capsys.readouterr().out == "Words.\n"
    with pytest.raises(UserError, match="draw_size is 100; pipelines draw in multiples of 8"):
        painter("nowhere", size=100)


def test_nothing_is_loaded_when_nothing_is_to_be_drawn(tmp_path):
    print_and_draw("Just words.", painter("nowhere"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_pickles_are_refused(pipeline, tmp_path):
    import shutil

    shutil.copytree(pipeline, tmp_path / "pickled")
    weights = next((tmp_path / "pickled" / "unet").glob("*.safetensors"))
    weights.with_suffix(".bin").write_bytes(b"\x80\x04.")
    weights.unlink()
    with pytest.raises(UserError, match="does not load as a text-to-image pipeline"):
        painter(str(tmp_path / "pickled")).draw(["a cat"], tmp_path / "out")


def test_a_folder_that_holds_no_pipeline_is_named(tmp_path):
    with pytest.raises(UserError, match="does not load as a text-to-image pipeline"):
        painter(str(tmp_path)).draw(["a cat"], tmp_path / "out")


def test_without_diffusers_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[draw\]'"):
        painter("nowhere")


def test_negative_settings_are_refused():
    with pytest.raises(UserError, match="cannot be negative"):
        painter("nowhere", steps=-1)
