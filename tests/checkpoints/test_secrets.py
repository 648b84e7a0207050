"""What a run writes down or sends holds no secret: all its files are searched, W&B's included."""

import http.server
import sys
import threading
from functools import partial

import pytest

from anymal.checkpoints import checkpoint
from anymal.config.schema import Config
from anymal.config.settings import load
from anymal.errors import UserError
from small_runs import make_encoders, pretrain_here, settings, write_pairs
from stores import KEY, serving
from stores import SECRET as SECRET_KEY

SIGNATURE, SECRET = "X-Amz-Signature=0123456789abcdef", "a-secret-of-the-environment"


@pytest.fixture
def address(tmp_path):
    """Of a server of tars that takes any signature."""
    write_pairs(tmp_path / "data", ["imu"], shards=1, per_shard=8)
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / "data")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/000.tar"
    server.shutdown()
    server.server_close()


def test_no_credentials_of_a_store_are_in_what_a_run_reads_from_it(tiny_llm, tmp_path, monkeypatch, capfd):
    write_pairs(tmp_path / "data", ["imu"], shards=1, per_shard=8)
    encoders, run = make_encoders(tmp_path / "encoders"), tmp_path / "run"
    with serving("s3", monkeypatch) as store:
        store.put("000.tar", (tmp_path / "data" / "000.tar").read_bytes())
        more = {"optim__steps": 1, "run__wandb": "offline", "data__cache": tmp_path / "cache"}
        pretrain_here(None, *settings(tiny_llm, encoders, run, f"{store.url}/000.tar", ["imu"], **more))
    assert f"{store.url}/000.tar" in (checkpoint.existing(run) / "recipe.yaml").read_text()
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    written = [path.read_bytes() for path in files] + [text.encode() for text in capfd.readouterr()]
    for secret in (KEY, SECRET_KEY):
        assert not any(secret.encode() in data for data in written)


def test_no_secret_of_a_recipe_is_in_what_its_run_writes(tiny_llm, address, tmp_path, monkeypatch):
    monkeypatch.setenv("ENCODERS", str(make_encoders(tmp_path / SECRET)))
    monkeypatch.setenv("NOTE", SECRET)
    run = tmp_path / "run"
    more = {"optim__steps": 1, "run__wandb": "offline", "data__cache": tmp_path / "cache", "run__samples": 1}
    given = settings(tiny_llm, tmp_path, run, f"{address}?{SIGNATURE}", ["imu"], **more)
    monkeypatch.setattr(sys, "argv", ["pretrain.py", f"data.shards={address}?{SIGNATURE}"])  # W&B would send it
    given = [item for item in given if "imu.encoder" not in item]
    pretrain_here(
        None, *given, "model.modalities.imu.encoder=${oc.env:ENCODERS}/imu", "run.data_license=see ${oc.env:NOTE}"
    )
    files = [path for path in run.rglob("*") if path.is_file() and not path.is_symlink()]
    assert {"recipe.yaml", "README.md", "adapter_config.json", "metrics.jsonl"} <= {path.name for path in files}
    assert any(path.suffix == ".wandb" for path in files)
    for path in files:
        data = path.read_bytes()
        assert SIGNATURE.encode() not in data and b"0123456789abcdef" not in data, path
        assert SECRET.encode() not in data, path
    folder = checkpoint.existing(run)
    assert "${oc.env:ENCODERS}/imu" in (folder / "recipe.yaml").read_text()
    assert address in (folder / "README.md").read_text()
    assert checkpoint.recipe(folder).model.modalities["imu"].encoder == str(tmp_path / SECRET / "imu")
    monkeypatch.delenv("NOTE")
    assert checkpoint.recipe(folder).run.data_license == "see ${oc.env:NOTE}"


@pytest.mark.parametrize(
    "override, says",
    [
        ("data.shard=https://host/a.tar?{}", "data.shard=https://host/a.tar: Key 'shard'"),
        ("data.shards=[https://host/a.tar?{}", "is not valid YAML"),
        ("https://host/a.tar?{}", "https://host/a.tar: Key 'https://host/a'"),
        ("https://me:{}@host/a.tar", "'https://host/a.tar' is neither a recipe nor an override"),
    ],
)
def test_no_secret_is_in_what_is_said_of_an_override(override, says):
    secret = "0123456789" if "@" in override else SIGNATURE
    with pytest.raises(UserError) as error:
        load(Config, None, [override.format(secret)])
    assert says in str(error.value) and "0123456789" not in str(error.value)
