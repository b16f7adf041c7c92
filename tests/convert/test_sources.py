"""Addresses on the Hugging Face Hub, without touching the network."""

import huggingface_hub
import pytest
import torch
from sparvar_convert.rules import ConversionError
from sparvar_convert.sources import choose_files, open_source

from tests.convert import sources

REPOSITORY = [
    "README.md",
    "infinity_2b_reg.pth",
    "infinity_8b_weights/config.json",
    "infinity_8b_weights/model-00001-of-00002.safetensors",
    "infinity_8b_weights/model-00002-of-00002.safetensors",
    "infinity_8b_weights/model.safetensors.index.json",
]
TEXT = ["config.json", "flax_model.msgpack", "model.safetensors", "pytorch_model.bin"]
TEXT += ["spiece.model", "tf_model.h5", "tokenizer.json"]


def test_a_file_or_a_folder_in_a_repository():
    assert choose_files(REPOSITORY, "infinity_2b_reg.pth") == ["infinity_2b_reg.pth"]
    assert choose_files(REPOSITORY, "infinity_8b_weights") == REPOSITORY[2:]
    assert choose_files(REPOSITORY) == ["infinity_2b_reg.pth"]
    assert choose_files(REPOSITORY, "nowhere") == []


def test_one_format_of_weights_and_what_lies_beside():
    wanted = ["config.json", "model.safetensors", "spiece.model", "tokenizer.json"]
    assert choose_files(TEXT) == wanted
    assert "pytorch_model.bin" in choose_files([n for n in TEXT if n != "model.safetensors"])


class FakeApi:
    def list_repo_files(self, repository, revision):
        if repository != "someone/infinity":
            raise OSError(f"404 Client Error.\n\nRepository Not Found: {repository}")
        return REPOSITORY


@pytest.fixture
def hub(tmp_path, monkeypatch):
    calls = []

    def snapshot_download(repository, revision, allow_patterns):
        calls.append((repository, revision, allow_patterns))
        torch.save(sources.infinity_weights(), tmp_path / "infinity_2b_reg.pth")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return calls


def test_address_is_fetched_and_opened(hub):
    opened = open_source("hf://someone/infinity/infinity_2b_reg.pth@v1")
    assert hub == [("someone/infinity", "v1", ["infinity_2b_reg.pth"])]
    assert opened.container == "flat state dict"
    assert "head.bias" in set(opened.reader.names())


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("hf://nobody", "not of the form"),
        ("hf://nobody/nothing", "cannot fetch hf://nobody/nothing: 404"),
        ("hf://someone/infinity/elsewhere", "holds no weights"),
    ],
)
def test_bad_addresses_are_one_line(hub, address, message):
    with pytest.raises(ConversionError, match=message) as error:
        open_source(address)
    assert "\n" not in str(error.value)
    assert hub == []
