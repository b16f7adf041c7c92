"""Commands in processes of their own, forked from one that has imported everything already."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from sparvar_jax.weights import checkpoint

_CODE = """
import json, os, resource, signal, sys
import sparvar_convert.export, sparvar_convert.run, orbax.checkpoint
from sparvar_jax.cli import main
from sparvar_jax.weights import files, joining
import tests.hardening.workers

def stop_at(step):
    # Die at one of the steps that give things their names or take them away.
    left = [step]
    def dying(call):
        def counted(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)
        return counted
    os.replace = dying(os.replace)
    for name in ("unlink", "mkdir"):
        setattr(joining.Path, name, dying(getattr(joining.Path, name)))
    files.shutil.rmtree = dying(files.shutil.rmtree)

print("ready", flush=True)
while line := sys.stdin.readline():
    job = json.loads(line)
    child = os.fork()
    if not child:
        out = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1), os.dup2(out, 2)
        if job["limit"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (job["limit"], job["limit"]))
        if job["step"] is not None:
            stop_at(job["step"])
        try:
            if job["call"]:
                getattr(tests.hardening.workers, job["call"])(*job["args"])
                code = 0
            else:
                code = main(job["args"])
        except SystemExit as error:
            code = error.code
        sys.stdout.flush()
        os._exit(code)
    print(child, flush=True)
    sys.stdin.readline()  # until then its number is nobody else's
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Runner:
    """Runs commands in forked processes, and ends them where asked to."""

    def __init__(self, folder: Path):
        self._out = folder / "told"
        self._server = subprocess.Popen(
            [sys.executable, "-c", _CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
        )
        assert self._server.stdout.readline() == "ready\n"

    def __call__(
        self,
        *args,
        after: float | None = None,
        number=signal.SIGKILL,
        step=None,
        limit=None,
        call: str | None = None,
    ) -> int:
        """Exit code of a command; negative is the signal that ended it.

        after: seconds until it gets the signal. step: of joining, at which it dies. limit: most
        bytes of any file it writes. call: a function of `workers.py` in place of a command.
        """
        job = {"args": list(map(str, args)), "out": str(self._out), "step": step, "limit": limit}
        job["call"] = call
        process = int(self._ask(json.dumps(job)))
        if after is not None:
            time.sleep(after)
            os.kill(process, number)
        return os.waitstatus_to_exitcode(int(self._ask("wait")))

    def _ask(self, line: str) -> str:
        assert self._server.stdin
        assert self._server.stdout
        self._server.stdin.write(line + "\n")
        self._server.stdin.flush()
        return self._server.stdout.readline()

    @property
    def told(self) -> str:
        """What the last command printed."""
        return self._out.read_text()

    def close(self) -> None:
        self._server.stdin.close()
        self._server.wait()
        self._server.stdout.close()


def leftovers(folder: Path) -> list[str]:
    """What does not belong into a model directory."""
    wanted = {*checkpoint.PARTS, checkpoint.CONFIG, checkpoint.MANIFEST}
    return sorted(path.name for path in folder.iterdir() if path.name not in wanted)


def torn(folder: Path) -> list[str]:
    """Parts that are not in the folder, `config.json` and `manifest.json` alike, or do not load."""
    config = checkpoint.read_config(folder)
    manifest = checkpoint.read_manifest(folder)
    found = []
    for part in checkpoint.PARTS:
        places = [part in config, part in manifest, (folder / part).is_dir()]
        if len(set(places)) > 1:
            found.append(f"{part}: {places}")
        elif all(places):
            checkpoint.part_reader(folder, part).restore()
    return found
