"""The report and the terminal's table, from a small run folder with real media files that are written here."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image, ImageDraw

from anymal.errors import UserError
from anymal.evaluation.metrics import wilson_interval
from anymal.evaluation.report import write_report
from anymal.evaluation.tables import chose_right, print_table, said_right

REPOSITORY = Path(__file__).parents[2]


def _write_media(folder: Path, count: int) -> None:
    av = pytest.importorskip("av")
    folder.mkdir(parents=True)
    for i in range(count):
        picture = Image.new("RGB", (160, 160), "white")
        ImageDraw.Draw(picture).ellipse((20 + 5 * i, 30, 110, 130), fill=("crimson", "gold", "teal")[i % 3])
        picture.save(folder / f"{i}.jpg")

        t = np.arange(24000) / 16000
        note = 0.5 * np.sin(2 * np.pi * 220 * (i + 1) * t) * np.exp(-2 * t)
        soundfile.write(folder / f"{i}.flac", note, 16000)

        rng = np.random.default_rng(i)
        swing = np.sin(np.arange(250)[:, None] / (6 + i) + np.arange(6)) * [3, 1, 9, 1, 2, 0.5]
        np.save(folder / f"{i}.imu.npy", (swing + 0.2 * rng.normal(size=(250, 6))).astype(np.float32))

        with av.open(str(folder / f"{i}.mp4"), "w") as container:
            stream = container.add_stream("libx264", rate=8, options={"preset": "ultrafast"})
            stream.width, stream.height, stream.pix_fmt = 96, 96, "yuv420p"
            for k in range(8):
                frame = Image.new("RGB", (96, 96), "white")
                ImageDraw.Draw(frame).rectangle((10 * k, 30, 10 * k + 25, 60), fill="royalblue")
                container.mux(stream.encode(av.VideoFrame.from_image(frame)))
            container.mux(stream.encode())


def _predictions(suffix: str, right: str, wrong: str, count: int) -> list[dict]:
    return [
        {
            "key": f"{i:05d}",
            "shard": "test-000000.tar",
            "member": suffix,
            "media": [f"media/{i}.{suffix}"],
            "question": "What is it? Answer in a few words.",
            "answer": right,
            "choice": right if i % 3 else wrong,
            "said": f"A {right}." if i % 3 else f"It is a {wrong} & <b>nothing</b> else.",
        }
        for i in range(count)
    ]


def write_run(run: Path, count: int = 4) -> dict:
    """A run folder as `make demo` leaves it; the evaluation is also returned."""
    _write_media(run / "media", count)
    for stage, steps, start in (("pretrain", 120, 4.0), ("finetune", 40, 1.6)):
        (run / stage).mkdir()
        rng = np.random.default_rng(steps)
        lines = []
        for step in range(1, steps + 1):
            line = {"step": step, "time": 1e9 + step, "tokens_per_s": 210.0, "wait_share": 0.02, "padding_share": 0.0}
            line |= {"answer_tokens_per_s": 31.0, "memory_gb": 1.4, "lr": 1e-3, "grad_norm": 0.7}
            for i, name in enumerate(("image", "video", "audio", "imu", "smell")):
                line[f"loss/{name}"] = start * np.exp(-step / (30 + 15 * i)) + 0.3 + 0.15 * abs(rng.normal())
            line["loss"] = float(np.mean([line[f"loss/{name}"] for name in ("image", "video", "audio", "imu")]))
            lines.append(json.dumps(line))
        (run / stage / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 99')
    rows = [
        {"module": "llm", "parameters": 134515008, "dtype": "uint8", "bits": 4, "trainable": False},
        {"module": "projectors.image", "parameters": 1234567, "dtype": "float32", "bits": 32, "trainable": True},
    ]
    (run / "pretrain" / "model.json").write_text(json.dumps(rows))
    (run / "pretrain" / "recipe.yaml").write_text("optim:\n  lr: 0.001\n")
    evaluation = {
        "precisions": {
            "4": {
                "image": _result(0.7, 0.1, 0.12, _predictions("jpg", "cat", "dog", count)),
                "video": _result(
                    0.64, 0.2, 0.18, _predictions("mp4", "square moving right", "circle moving up", count)
                ),
                "audio": _result(0.56, 0.1, 0.14, _predictions("flac", "guitar", "drum", count)),
                "imu": _result(0.8, 0.0, 0.0, _predictions("imu.npy", "pendulum swing", "row", count)),
                "smell": {"n": 2, "predictions": [{"key": "1", "question": "", "answer": "rose", "said": "Rose!"}]},
            }
        },
        "notes": ["Video: generated motion over real pictures."],
        "trained_parameters": 4567890,
        "tokens_per_s": 212.4,
    }
    (run / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


def _result(accuracy: float, blank: float, shuffled: float, predictions: list[dict]) -> dict:
    def condition(share: float) -> dict:
        by = {"sum": share, "bytes": share / 2, "blank": None}
        free = {"exact": 0.5, "cider_d": 1.234, "empty": 0.25, "cut": 0.0, "loss": 0.5}
        return {"n": 50, "accuracy": share, "accuracy_by": by, **free}

    conditions = {"own": condition(accuracy), "blank": condition(blank), "shuffled": condition(shuffled)}
    interval = wilson_interval(round(50 * accuracy), 50)
    return {"n": 50, "closed": 50, "chance": 0.14, "interval": interval, **conditions, "predictions": predictions}


def test_page_holds_every_modality_and_needs_no_network(tmp_path):
    write_run(tmp_path)
    page = write_report(tmp_path).read_text()
    for name in ("image", "video", "audio", "imu", "smell"):
        assert f"<h2>{name}</h2>" in page
    kinds = re.findall(r"src=\"data:([a-z]+/[a-z0-9]+);base64,", page)
    assert kinds.count("video/mp4") == kinds.count("audio/flac") == 4
    assert kinds.count("image/jpeg") == 4 + 4, "pictures, and strips of frames"
    assert kinds.count("image/png") == 4 + 4 + 2, "sounds, motions, and the losses of two stages"
    assert "134,515,008" in page
    assert "4,567,890" in page
    assert "lr: 0.001" in page
    assert "&amp; &lt;b&gt;nothing&lt;/b&gt;" in page, "what a model says is text"
    without_data = re.sub(r"data:[a-z/0-9]+;base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.findall(r"https?:|//|@import|url\(", without_data)
    assert not re.findall(r"(?:src|href)=\"(?!\")", without_data), "everything that is shown is inside"


def test_media_that_cannot_be_shown_do_not_stop_the_page(tmp_path):
    (tmp_path / "media").mkdir()
    media = {"a.mp4": b"no video", "b.flac": b"no sound", "c.npy": b"no array", "d.scent": b"?"}
    for name, content in media.items():
        (tmp_path / "media" / name).write_bytes(content)
    (tmp_path.parent / "outside.jpg").write_bytes(b"secret")
    names = [f"media/{name}" for name in media] + ["media/missing.jpg", "../outside.jpg"]
    predictions = [{"answer": "x", "said": "y", "media": [name]} for name in names]
    (tmp_path / "evaluation.json").write_text(json.dumps({"precisions": {"4": {"any": {"predictions": predictions}}}}))
    page = write_report(tmp_path).read_text()
    assert page.count('class="card"') == len(names)
    assert page.count("cannot be shown") == 3
    assert "of a kind that the page cannot show" in page
    assert "not there: missing.jpg" in page
    assert "c2VjcmV0" not in page, "a page holds nothing from outside its run"


def test_table_for_the_terminal(tmp_path):
    lines = print_table(write_run(tmp_path)).splitlines()
    assert re.split(r"  +", lines[0])[:8] == [
        "closed questions",
        "n",
        "accuracy",
        "95%",
        "blank",
        "shuffled",
        "× control",
        "chance",
    ]
    image = ["image", "50", "70%", "56–81%", "10%", "12%", "5.8×", "14%", "70%", "35%", "–"]
    assert lines[2].split() == image
    assert lines[5].split()[6] == "∞"
    assert len({len(line) for line in lines[:6]}) == 1, "columns are aligned"
    free = lines.index("") + 1
    assert lines[free].startswith("free answers")
    assert lines[free + 2].split() == ["image", "50", "50%", "50%", *["1.23"] * 3, "25%", "0%", *["0.50"] * 3]
    assert lines[free + 6].split() == ["smell", "2", *"––––––––––"], "a set without options has no other row"
    start = lines.index("audio")
    assert lines[start + 1].startswith("  ✗ chose drum, ✗ said “It is a drum")
    assert lines[start + 2] == "  ✓ chose guitar, ✗ said “A guitar.” (answer: guitar)"
    assert lines[start + 4] == "", "three predictions"


def test_an_empty_answer_is_shown_empty(tmp_path):
    """It was once printed as the chosen option, in quotes and with a tick."""
    evaluation = write_run(tmp_path, count=1)
    prediction = {"answer": "dog", "choice": "dog", "said": "", "question": "What?"}
    evaluation["precisions"] = {"4": {"pets": _result(1.0, 0.5, 0.5, [prediction])}}
    assert "  ✓ chose dog, ✗ said “” (answer: dog)" in print_table(evaluation).splitlines()
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    assert "<p>said “”</p>" in write_report(tmp_path).read_text()


def test_precisions_stand_side_by_side(tmp_path):
    evaluation = write_run(tmp_path, count=1)
    assert "32 bits" not in print_table(evaluation)
    at_32 = _result(0.5, 0.1, 0.1, []) | {"same_choice": 0.6}
    evaluation["precisions"]["32"] = dict.fromkeys(evaluation["precisions"]["4"], at_32)
    lines = print_table(evaluation).splitlines()
    (start,) = (i for i, line in enumerate(lines) if line.startswith("precision"))
    assert "same choice as at 4" in lines[start]
    assert lines[start + 2].split() == ["image,", "4", "bits", "70%", "56–81%", "–", "50%", "1.23", "25%", "0.50"]
    assert lines[start + 3].split()[:6] == ["image,", "32", "bits", "50%", "37–63%", "60%"]


def test_yes_no_questions_have_a_table_of_their_own(tmp_path):
    evaluation = write_run(tmp_path, count=1)
    assert "yes/no" not in print_table(evaluation)
    good = {"n": 50, "accuracy": 0.7, "precision": 0.8, "recall": 0.6, "f1": 0.69, "yes_ratio": 0.4}
    never = good | {"precision": None, "recall": 0.0, "f1": 0.0, "yes_ratio": 0.0}
    evaluation["precisions"]["4"]["image"]["yes_no"] = {"said": never, "chosen": good, "blank": never, "shuffled": None}
    lines = print_table(evaluation).splitlines()
    start = lines.index("", lines.index("") + 1) + 1
    assert lines[start].split() == ["yes/no", "questions", "n", "accuracy", "precision", "recall", "F1", "says", "yes"]
    assert lines[start + 2].split() == ["image,", "said", "50", "70%", "–", "0%", "0%", "0%"]
    assert lines[start + 3].split() == ["image,", "chosen", "50", "70%", "80%", "60%", "69%", "40%"]
    assert lines[start + 4].startswith("image, blank") and lines[start + 5 : start + 7] == ["", "image"]
    assert len({len(line) for line in lines[start : start + 5]}) == 1, "columns are aligned"


def test_choice_and_words_are_judged_apart():
    assert chose_right({"choice": "Cat", "said": "a dog", "answer": "Cat"})
    assert not said_right({"choice": "Cat", "said": "a dog", "answer": "Cat"})
    assert said_right({"said": "Rose!", "answer": "rose"}) and chose_right({"said": "Rose!", "answer": "rose"}) is None
    assert not said_right({"said": "a rose", "answer": "rose"})
    assert said_right({"said": None, "answer": "rose"}) is None


def test_answers_without_words_are_told_apart():
    for right, wrong in (("C", "C++"), ("+", "-"), ("😀", "😢")):
        assert chose_right({"choice": right, "answer": right}) and not chose_right({"choice": wrong, "answer": right})
    assert said_right({"said": "+", "answer": "+"}) and not said_right({"said": "-", "answer": "+"})
    assert not said_right({"said": "", "answer": "😀"}), "an empty answer is none"


def test_a_stage_without_evaluation_is_enough(tmp_path):
    (tmp_path / "pretrain").mkdir()
    (tmp_path / "pretrain" / "metrics.jsonl").write_text('{"step": 1, "time": 0, "loss": NaN}\n')
    assert "Stage: pretrain" in write_report(tmp_path).read_text()


def test_nothing_to_report_is_said(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        write_report(tmp_path)


def test_command_line(tmp_path):
    write_run(tmp_path, count=1)
    command = [sys.executable, str(REPOSITORY / "launch/report.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.startswith("closed questions")
    assert done.stdout.endswith(f"{tmp_path}/report.html\n")
