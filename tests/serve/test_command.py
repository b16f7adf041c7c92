"""What `sparvar serve` refuses before it compiles anything."""

import socket

import pytest

from sparvar_jax.cli import main
from sparvar_jax.serve import running
from sparvar_jax.serve.settings import Settings
from tests.tiny_var import tiny_model


@pytest.fixture(autouse=True)
def no_compiling(monkeypatch):
    from sparvar_jax.serve import warming

    monkeypatch.setattr(warming, "warm_up", lambda *_: pytest.fail("it began to compile"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--batches", "many"], "--batches takes numbers such as 1,2,4, got 'many'"),
        (["--batches", "0,2"], "batches must be at least 1, got 0"),
        (["--queue", "2"], "a queue of 2 cannot take a request for 10 pictures"),
        (["--seconds", "0"], "must be positive"),
        (["--api-key", " "], "the API key is empty"),
        (["--safety-filter", "nothing:here"], "No module named 'nothing'"),
        (["--safety-filter", "json:nothing"], "has no attribute 'nothing'"),
        (["--size", "33x32"], "cannot draw 33x32, but 32x32"),
        (["--plan", "sparser"], "unknown policy 'sparser'"),
        (["--host", "203.0.113.1"], "cannot serve at 203.0.113.1:8000"),
    ],
)
def test_bad_options_end_in_one_line(tiny, capsys, options, said):
    assert main(["serve", "--model", str(tiny), *options]) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


def test_a_port_that_is_taken_is_found_first(tiny, capsys):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert main(["serve", "--model", "/no/model", "--port", port]) == 2
    assert "Address already in use; choose another" in capsys.readouterr().err


def test_class_models_are_refused(capsys):
    folder, _ = tiny_model()
    assert main(["serve", "--model", str(folder)]) == 2
    assert "draws classes: serve a model that draws prompts" in capsys.readouterr().err


def test_addresses_of_this_machine_alone():
    for host, alone in (
        ("127.0.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("192.0.2.1", False),
        ("example.org", False),
    ):
        assert running.is_loopback(host) == alone


def test_a_batch_is_filled_up_to_the_next_size():
    settings = Settings(batches=(4, 1, 4))
    assert [settings.padded(count) for count in (1, 2, 4)] == [1, 4, 4]
    assert settings.largest == 4
