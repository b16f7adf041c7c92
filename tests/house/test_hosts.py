"""Several processes that share a job: each draws its part, and a kill loses and repeats nothing."""

import collections
import json
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

from sparvar_jax.pipelines import metadata
from sparvar_jax.pipelines.prompt_files import Entry, read_prompts
from sparvar_jax.pipelines.prompt_jobs import PromptJob, run_prompts
from sparvar_jax.pipelines.sampling_jobs import SampleJob
from sparvar_jax.runtime.hosts import Host, join

ENTRIES = tuple(Entry(f"prompt {n}", 10 + n, "1M" if n in (3, 4) else None) for n in range(8))
JOB = PromptJob(ENTRIES, batch=2, settings=(("plan", "dense"),))
SAMPLES = SampleJob((0, 1, 2), per_class=3, batch=2)


def pictures(entries):
    """Pictures that depend on prompt and seed alone."""
    return np.stack([
        np.random.default_rng([len(entry.prompt), entry.seed]).integers(0, 256, (4, 4, 3), np.uint8)
        for entry in entries
    ])  # fmt: skip


def samples(labels, seeds):
    return pictures([Entry(str(label), seed) for label, seed in zip(labels, seeds, strict=True)])


def check(folder, job=JOB):
    """Every picture is there, and is its entry's."""
    files = sorted(file.name for file in folder.iterdir() if file.suffix == ".png")
    assert files == [f"{place:06d}.png" for place in range(len(job.entries))]
    for place, expected in enumerate(pictures(job.entries)):
        found = np.asarray(Image.open(folder / f"{place:06d}.png"))
        np.testing.assert_array_equal(found, expected)
    assert {file.name for file in folder.iterdir()} == {*files, "job.json"}


def test_batches_are_cut_from_fixed_places_of_one_shape():
    assert JOB.batches == ((0, 1), (2,), (3, 4), (5, 6), (7,))


def test_a_job_that_was_stopped_draws_what_is_missing_and_nothing_twice(tmp_path):
    seen = collections.Counter()

    def draw(entries, stop=3):
        if len(seen) >= stop:
            raise KeyboardInterrupt
        seen.update({entry.prompt for entry in entries})
        return pictures(entries)

    with pytest.raises(KeyboardInterrupt):
        run_prompts(JOB, draw, tmp_path / "out")
    before = dict(seen)
    assert set(before) == {"prompt 0", "prompt 1", "prompt 2"}
    (tmp_path / "out" / ".sparvar-0123456789abcdef.part").touch()  # what a kill may leave
    (tmp_path / "out" / "000001.png").write_bytes(b"damaged")
    drawn = run_prompts(JOB, lambda entries: draw(entries, 99), tmp_path / "out")
    assert drawn == 6  # the damaged one, and five that were missing
    assert seen == collections.Counter({f"prompt {n}": 1 + (n < 2) for n in range(8)})
    check(tmp_path / "out")
    assert run_prompts(JOB, pytest.fail, tmp_path / "out") == 0


def test_parts_of_several_processes_make_the_whole(tmp_path):
    drawn = [
        run_prompts(JOB, pictures, tmp_path / "out", host=AlwaysThere(index, 3))
        for index in range(3)
    ]
    assert drawn == [4, 2, 2]
    check(tmp_path / "out")


class AlwaysThere(Host):
    """A process that waits for nobody."""

    def wait(self, name):
        pass


def test_folders_of_other_jobs_are_left_alone(tmp_path):
    run_prompts(JOB, pictures, tmp_path / "out")
    other = PromptJob(ENTRIES[:3], 2, (("plan", "dense"),))
    with pytest.raises(ValueError, match="holds pictures of another job"):
        run_prompts(other, pytest.fail, tmp_path / "out")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "000000.png").touch()
    with pytest.raises(ValueError, match="holds pictures of something else"):
        run_prompts(JOB, pytest.fail, tmp_path / "mine")
    with pytest.raises(ValueError, match="does not exist"):
        run_prompts(JOB, pytest.fail, tmp_path / "no" / "such")


def test_pictures_say_what_they_are_of(tmp_path):
    run_prompts(JOB, pictures, tmp_path, describe=lambda entry: {"prompt": entry.prompt})
    assert metadata.read_metadata(tmp_path / "000005.png")["prompt"] == "prompt 5"


def test_files_of_prompts(tmp_path):
    plain = tmp_path / "prompts.txt"
    plain.write_text("a red apple\n\n  a blue cup \n")
    assert read_prompts(plain, 5) == (Entry("a red apple", 5), Entry("a blue cup", 6))
    lines = tmp_path / "prompts.jsonl"
    lines.write_text(
        '{"prompt": "a", "seed": 9, "size": "1M", "aspect_ratio": "3:2"}\n{"prompt": "b"}'
    )
    assert read_prompts(lines) == (Entry("a", 9, "1M", "3:2"), Entry("b", 1))


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"prompt": 3}', "line 1 has no prompt"),
        ('{"prompt": "a", "sead": 3}', "line 1 has 'sead': use prompt, seed, size"),
        ('{"prompt": "a", "seed": -1}', "line 1: seeds lie in 0.."),
        ('{"prompt": "a", "size": 7}', "line 1: size must be text"),
        ("[1]", "line 1 is not a JSON object"),
        ("{", "line 1 is not JSON"),
        ("", "holds no prompt"),
    ],
)
def test_wrong_lines_are_named(tmp_path, line, told):
    file = tmp_path / "prompts.jsonl"
    file.write_text(line)
    with pytest.raises(ValueError, match=told):
        read_prompts(file)


def test_joining_says_what_is_missing():
    assert join(None) == Host(0, 1)
    with pytest.raises(ValueError, match="must be 'auto' or HOST:PORT"):
        join("here", 2, 0)
    with pytest.raises(ValueError, match="got 2 and 2"):
        join("localhost:1234", 2, 2)
    with pytest.raises(ValueError, match="give HOST:PORT"):
        join(None, 2, 0)


WORKER = textwrap.dedent(
    """
    import json, sys
    from pathlib import Path
    from sparvar_jax.runtime import hosts
    host = hosts.join(sys.argv[1], 2, int(sys.argv[2]))
    from sparvar_jax.pipelines.prompt_jobs import run_prompts
    from sparvar_jax.pipelines.sampling_jobs import run_job
    from tests.house.test_hosts import JOB, SAMPLES, pictures, samples

    drawn = []
    def draw(labels, seeds):
        drawn.append(seeds[0])
        return samples(labels, seeds)

    folder = Path(sys.argv[3])
    count = run_prompts(JOB, pictures, folder / "out", host=host)
    host.wait("prompts")
    run_job(SAMPLES, draw, folder / "samples.npz", host=host)
    print(json.dumps({"index": host.index, "count": count, "drawn": drawn}), flush=True)
    """
)


def test_two_processes_divide_their_jobs(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, address, str(index), str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for index in range(2)
    ]  # fmt: skip
    ended = [(*worker.communicate(timeout=300), worker.returncode) for worker in workers]
    assert [code for _, _, code in ended] == [0, 0], ended
    told = sorted(
        (json.loads(out.splitlines()[-1]) for out, _, _ in ended), key=lambda t: t["index"]
    )
    assert [one["count"] for one in told] == [5, 3]
    assert [one["drawn"] for one in told] == [[0, 4, 8], [2, 6]]
    check(tmp_path / "out")
    with np.load(tmp_path / "samples.npz") as found:
        expected = samples(SAMPLES.labels, range(SAMPLES.total))
        np.testing.assert_array_equal(found["arr_0"], expected)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out", "samples.npz"]
