"""What a user reads when something does not fit: it names what to change, at once."""

import http.server
import re
import threading
import time
from pathlib import Path

import pytest
import torch
import webdataset as wds

from anymal.adapters import REGISTRY
from anymal.checkpoints.build import load_encoder
from anymal.config.schema import Config, LLMConfig, ModalityConfig
from anymal.config.settings import load
from anymal.errors import UserError
from anymal.model.hub import license_of
from anymal.model.llm import load_llm, read_config
from anymal.training.run import run_stage
from small_runs import make_encoders, settings, write_pairs

KINDS = ["image"]
PROJECTOR = r"model\.modalities\.image\.projector"


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("files")
    return make_encoders(folder / "encoders"), write_pairs(folder / "pairs", KINDS)


@pytest.fixture
def stage(tiny_llm, files, tmp_path):
    """Run a stage in this process; returns the run's folder."""

    def run(name: str = "run", **more) -> Path:
        run_stage(load(Config, None, settings(tiny_llm, files[0], tmp_path / name, files[1], KINDS, **more)), REGISTRY)
        return tmp_path / name

    return run


def test_a_projector_that_does_not_fit_is_named_by_its_settings(stage):
    first = stage("first", optim__steps=1)
    for key, here, there in (("kind", "linear", "mlp"), ("kind", "resampler", "mlp"), ("width", 24, 0)):
        said = f"does not fit {PROJECTOR}, which has {key} {here} here: it was trained with {PROJECTOR}.{key}={there};"
        with pytest.raises(UserError, match=said):
            more = {"model__checkpoint": first, f"model__modalities__image__projector__{key}": here}
            stage("second", optim__steps=1, **more)
    described = first / "checkpoints/latest/adapters/image/adapter_config.json"
    described.write_text(described.read_text().replace('"width": 0', '"width": 24'))  # then only a tensor tells
    with pytest.raises(UserError, match=rf"does not fit {PROJECTOR}: .* is \(.*\) there and \(.*\) in this model"):
        stage("second", optim__steps=1, model__checkpoint=first, model__modalities__image__projector__width=24)


def test_the_quarantine_is_named_if_there_is_one(stage, capsys):
    run = stage(optim__steps=1)
    out = capsys.readouterr().out
    assert f"done: {run}" in out and "bad samples" not in out
    (run / "quarantine-1.jsonl").write_text("{}")  # of another process
    stage(optim__steps=2, run__save_every=1)
    assert f"bad samples: {run}/quarantine-1.jsonl" in capsys.readouterr().out


def test_a_preview_that_finds_no_good_sample_names_the_runs_limits(stage, tmp_path):
    with wds.TarWriter(str(tmp_path / "bad.tar")) as tar:
        for i in range(9):
            tar.write({"__key__": f"b{i}", "jpg": b"no picture", "txt": "a"})
    limits = {"data__max_bad_in_a_row": 3, "data__max_bad_share": 0.25}
    with pytest.raises(UserError, match=r"max_bad_in_a_row is 3 and data\.max_bad_share is 0\.25"):
        stage(optim__steps=1, run__samples=1, run__samples_from=tmp_path / "bad.tar", **limits)


# ---------------------------------------------------------------------------------------------------------- the hub


class Hub(http.server.BaseHTTPRequestHandler):
    """Refuses as the hub does: what is called missing is not there, the rest is gated."""

    def answer(self) -> None:
        self.server.asked.append(self.path)
        code = "RepoNotFound" if "missing" in self.path else "GatedRepo"
        self.send_response(self.server.status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD = answer

    def log_message(self, *_) -> None:
        pass


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub of this process is a server on this machine, and its cache is empty."""
    from huggingface_hub import constants

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.status, server.asked = 401, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server
        server.shutdown()


@pytest.mark.parametrize("status", [401, 403])
def test_a_gated_model_says_so_at_once(hub, status):
    hub.status, name = status, f"llama/gated-{status}"
    said = (
        rf"{name} is gated: accept its licence at https://huggingface.co/{name} and log in \(hf auth login, or HF_TOKEN"
    )
    for load_it in (
        lambda: load_llm(LLMConfig(name=name), torch.device("cpu")),
        lambda: read_config(name),
        lambda: load_encoder(REGISTRY, "image", ModalityConfig(encoder=name)),
    ):
        with pytest.raises(UserError, match=said) as raised:
            load_it()
        assert "\n" not in str(raised.value)
    assert license_of(name) == "unknown"
    assert [path.rsplit("/", 1)[1] for path in hub.asked if name in path] == ["config.json", "README.md"]


def test_a_model_that_is_nowhere_says_so_at_once(hub):
    with pytest.raises(
        UserError, match=r"no folder some/missing, and no such model on the hub.*model\.llm\.name=FOLDER"
    ):
        load_llm(LLMConfig(name="some/missing"), torch.device("cpu"))
    with pytest.raises(UserError, match=r"model\.llm\.name: there is no folder /a/b/c; .*give model\.llm\.name=FOLDER"):
        load_llm(LLMConfig(name="/a/b/c"), torch.device("cpu"))


def test_without_a_network_nothing_is_tried_for_a_minute(hub):
    hub.shutdown()
    hub.server_close()
    began = time.monotonic()
    with pytest.raises(UserError, match=r"some/llm, it is not in the hub's cache, and the hub cannot be reached: "):
        load_llm(LLMConfig(name="some/llm"), torch.device("cpu"))
    with pytest.raises(UserError, match=re.escape("give model.modalities.NAME.encoder=FOLDER")):
        load_encoder(REGISTRY, "image", ModalityConfig(encoder="some/encoder"))
    assert license_of("some/llm") == "unknown"
    assert time.monotonic() - began < 5
