"""Signals end commands with one line and the documented codes, wherever they strike."""

import asyncio
import os
import signal
import sys

import pytest
import typer

from sparvar_jax.cli import console, stopping


class Finaliser:
    """An interrupt that strikes here is swallowed by Python."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)


async def ends():
    os.kill(os.getpid(), signal.SIGINT)


def swallowed():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        return


def changed():
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        raise ValueError("the stream has ended") from None


def plain():
    os.kill(os.getpid(), signal.SIGINT)


WAYS = {
    "plain": plain,
    "finaliser": lambda: Finaliser() and None,
    "event loop": lambda: asyncio.run(ends()),
    "swallowed": swallowed,
    "changed": changed,
}


def application(work):
    app = typer.Typer(pretty_exceptions_enable=False, add_completion=False)
    app.command()(lambda: work())
    return app


@pytest.mark.parametrize("way", WAYS)
def test_no_interrupt_is_lost(way, capsys):
    with pytest.raises(KeyboardInterrupt), stopping.cleanly():
        WAYS[way]()
    assert capsys.readouterr().err == ""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert sys.unraisablehook is not None


@pytest.mark.parametrize("way", WAYS)
def test_interrupted_commands_say_so_and_exit_with_130(way, capsys):
    assert console.run(application(WAYS[way]), []) == 130
    assert capsys.readouterr().err == "error: interrupted\n"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_termination_exits_with_143(name, capsys):
    def twice():
        try:
            os.kill(os.getpid(), getattr(signal, name))
        except BaseException:
            os.kill(os.getpid(), getattr(signal, name))  # one more while it cleans up
            raise

    number = getattr(signal, name)
    found = signal.signal(number, signal.SIG_DFL)  # what these tests run under may ignore SIGHUP
    try:
        assert console.run(application(twice), []) == 143
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, found)
    assert capsys.readouterr().err == f"error: stopped by {name}\n"


def test_programming_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError):
        console.run(application(lambda: 1 / 0), [])
