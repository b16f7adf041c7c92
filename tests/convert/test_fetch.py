"""Released models by name: a hub on this machine, asked over HTTP by `huggingface_hub` itself."""

import dataclasses
import hashlib
import resource

import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub import constants

from sparvar_jax.cli import main
from sparvar_jax.pipelines import loading, released
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.weights import checkpoint, storage
from tests import hub_server
from tests.tiny_var import CONFIG, TOKENIZER, tiny_pipe, twins

NAME = "tiny-var"
REPOSITORY = "someone/tiny"
RELEASE = released.Release(
    NAME,
    "a tiny VAR: classes, 24 px",
    (
        released.Source("transformer", "var", REPOSITORY, "var_d2.pth", "MIT"),
        released.Source("tokenizer", "vqvae", "other/parts", "vae.pth", "Apache-2.0"),
    ),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The two checkpoints as bytes."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for twin, name in zip(twins(CONFIG, TOKENIZER), ("var_d2.pth", "vae.pth"), strict=True):
        torch.save(twin.state_dict(), folder / name)
    return {name: (folder / name).read_bytes() for name in ("var_d2.pth", "vae.pth")}


@pytest.fixture
def hub(files, tmp_path, monkeypatch):
    """A hub that holds the release among unrelated files, and a home of the test's own."""
    monkeypatch.setattr(released, "RELEASES", {NAME: RELEASE})
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    with hub_server.serving() as (hub, address):
        hub_server.point_at(monkeypatch, address, tmp_path / "hub")
        hub.repositories[REPOSITORY] = {
            "README.md": b"# weights\n",
            "var_d2.pth": files["var_d2.pth"],
            "var_d99.pth": b"unrelated" * 10000,
            "samples/grid.png": b"\x89PNG" * 2000,
            "training/model-00001-of-00009.safetensors": b"unrelated" * 1000,
        }
        hub.repositories["other/parts"] = {"vae.pth": files["vae.pth"]}
        yield hub


def fetched(capsys):
    """Exit code and what was shown of `sparvar fetch`."""
    code = main(["fetch", NAME])
    return code, capsys.readouterr()


def refused(capsys, code=2):
    """The one line with which `sparvar fetch` fails."""
    found, shown = fetched(capsys)
    assert found == code
    (line,) = [line for line in shown.err.splitlines() if line.startswith("error:")]
    assert len(line) < 500
    return line


def require_same_weights(a, b):
    """Every parameter of two pipelines is equal, by name."""
    for part, module in a.model.parts.items():
        found = storage.flatten(nnx.to_pure_dict(nnx.state(module)))
        expected = storage.flatten(nnx.to_pure_dict(nnx.state(b.model.parts[part])))
        assert found.keys() == expected.keys()
        for path, array in found.items():
            np.testing.assert_array_equal(array, expected[path], err_msg=path)


def test_a_name_becomes_a_model_that_every_command_takes(hub, tmp_path, capsys):
    code, shown = fetched(capsys)
    assert code == 0
    assert "MIT (someone/tiny), Apache-2.0 (other/parts)" in shown.out
    assert f"draw with --model {NAME}" in shown.out
    folder = tmp_path / "data" / "sparvar_jax" / "models" / NAME
    manifest = checkpoint.read_manifest(folder)
    assert manifest["transformer"]["commit"] == hub.commit(REPOSITORY)
    asked = {path for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}
    assert {path.rpartition("/")[2] for path in asked} == {"var_d2.pth", "vae.pth"}
    pipe = Pipeline.from_pretrained(NAME, dtype="float32")
    require_same_weights(pipe, tiny_pipe())
    assert main(["info", "--model", NAME]) == 0
    assert "pictures of 24x24" in capsys.readouterr().out
    counted = ["--classes", "99", "--out", str(tmp_path / "many.npz")]
    assert main(["sample", "--model", NAME, *counted]) == 2  # after loading and fingerprint
    assert "classes must lie in 0..4" in capsys.readouterr().err
    before = len(hub.asked)
    assert fetched(capsys)[0] == 0
    assert len(hub.asked) == before


def test_an_interrupted_download_goes_on_where_it_broke(hub, files, monkeypatch, capsys):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 16)  # whole chunks are kept
    third = len(files["vae.pth"]) // 3
    hub.breaks["vae.pth"] = [third]
    assert fetched(capsys)[0] == 0
    assert hub.got("GET", "/vae.pth") == ["", f"bytes={third >> 16 << 16}-"]
    assert released.missing_parts(RELEASE) == []


def test_a_file_that_is_not_what_its_repository_announces_is_removed(hub, files, tmp_path, capsys):
    damaged = bytearray(files["vae.pth"])
    damaged[len(damaged) // 2] ^= 1
    hub.lies["vae.pth"] = bytes(damaged)
    line = refused(capsys)
    assert "vae.pth has sha256" in line
    assert hashlib.sha256(files["vae.pth"]).hexdigest()[:16] in line
    assert released.missing_parts(RELEASE) == ["tokenizer"]
    assert not list((tmp_path / "hub").rglob("vae.pth"))
    hub.lies.clear()
    assert fetched(capsys)[0] == 0
    assert len(hub.got("GET", "/var_d2.pth")) == 1


def test_a_file_that_changed_since_its_hash_was_published_is_refused(hub, monkeypatch, capsys):
    transformer = dataclasses.replace(RELEASE.sources[0], sha256="0" * 64)
    changed = dataclasses.replace(RELEASE, sources=(transformer, RELEASE.sources[1]))
    monkeypatch.setattr(released, "RELEASES", {NAME: changed})
    assert "someone/tiny was changed" in refused(capsys)
    assert released.missing_parts(changed) == ["transformer", "tokenizer"]


def test_a_part_that_its_repository_lost_is_named_before_anything_is_fetched(hub, capsys):
    del hub.repositories["other/parts"]["vae.pth"]
    assert "tiny-var lacks its tokenizer: other/parts has no weights at vae.pth" in refused(capsys)
    assert not hub.got("GET", "/var_d2.pth")


def test_without_a_network_the_cache_is_enough_and_its_lack_is_one_line(
    hub, tmp_path, monkeypatch, capsys
):
    assert fetched(capsys)[0] == 0
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "other"))  # the cache alone has it
    before = len(hub.asked)
    with pytest.raises(ValueError, match="`sparvar fetch tiny-var`"):
        loading.model_folder(NAME)
    assert fetched(capsys)[0] == 0
    assert len(hub.asked) == before
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "third"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    assert "not in the Hub's cache" in refused(capsys)
    assert not (tmp_path / "third").exists()


def test_a_hub_that_does_not_answer_is_one_line(hub, monkeypatch, capsys):
    hub_server.point_at(monkeypatch, "http://127.0.0.1:9", constants.HF_HUB_CACHE)
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the library tries again for 20 s
    assert "the Hub does not answer" in refused(capsys)


def test_no_room_is_found_before_the_download(hub, monkeypatch, capsys):
    free = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: free)
    line = refused(capsys)
    assert "needs 0.0 GiB" in line
    assert "make room" in line
    assert not hub.got("GET", "/var_d2.pth")


def test_a_disk_that_fills_while_downloading_is_one_line(hub, files, capsys):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(files["var_d2.pth"]) // 2, limits[1]))
    try:
        line = refused(capsys)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "File too large" in line
    assert released.missing_parts(RELEASE) == ["transformer", "tokenizer"]
    assert fetched(capsys)[0] == 0


def test_unknown_names_get_the_nearest_one(capsys):
    assert main(["fetch", "infinty-2b"]) == 2
    assert "did you mean infinity-2b?" in capsys.readouterr().err
    assert main(["info", "--model", "infinity-8b-52"]) == 2
    assert "did you mean infinity-8b-512?" in capsys.readouterr().err
    assert main(["fetch"]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in released.RELEASES)


def test_the_table_names_every_part_of_every_family_once():
    for release in released.RELEASES.values():
        parts = [source.part for source in release.sources]
        assert tuple(parts) == tuple(p for p in checkpoint.PARTS if p in parts)
        assert parts[:2] == ["transformer", "tokenizer"]
        assert all(released.is_repository(source.repository) for source in release.sources)


def test_a_saved_model_is_pushed_and_comes_back_the_same(hub, tmp_path, capsys):
    pipe = tiny_pipe()
    address = pipe.push_to_hub("me/mine", commit_message="a tiny one")
    assert address.endswith(hub.commit("me/mine"))
    assert "library_name: sparvar_jax" in hub.repositories["me/mine"]["README.md"].decode()
    hub.repositories["me/mine"]["unrelated.bin"] = b"x" * 10000
    back = Pipeline.from_pretrained("me/mine", dtype="float32")
    require_same_weights(back, pipe)
    assert not hub.got("GET", "unrelated.bin")
    assert main(["info", "--model", "me/mine"]) == 0
    assert "pictures of 24x24" in capsys.readouterr().out
    for name, told in ((REPOSITORY, "holds no model of sparvar_jax"), ("me/none", "cannot fetch")):
        with pytest.raises(ValueError, match=told) as error:
            Pipeline.from_pretrained(name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="`sparvar fetch me/other`"):
        Pipeline.from_checkpoint("me/other")
