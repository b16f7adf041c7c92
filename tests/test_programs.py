"""Kept executables: a second process compiles nothing, draws the same; no key is too wide."""

import contextlib
import dataclasses
import hashlib
import pathlib
import pickle
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from pallas_kernels import backends
from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.plans.strategy import Dense
from sparvar_jax.policies.registry import parse_plan
from sparvar_jax.runtime import generate, programs, steps
from sparvar_jax.runtime.step import step_spec
from tests.house.support import embed

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2)))
FOLLOWED = ScaleSchedule.of(((1, 1), (2, 2), (4, 4)))
CONFIG = InfinityConfig(2, 64, 2, text_width=128, bits=8, dtype="float32")
CACHE = "jax_compilation_cache_dir"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A compile cache, and executables kept on a CPU as they are on a GPU.

    jax's own part of the cache stays empty: XLA's CPU compiler writes executables that it has read
    itself without their functions.
    """
    monkeypatch.setattr(programs, "KEPT_ON", ("cpu", "gpu"))
    with configured(tmp_path, keep_after=1e9):
        yield tmp_path / "programs"


@contextlib.contextmanager
def configured(cache, keep_after):
    new = {CACHE: str(cache), "jax_persistent_cache_min_compile_time_secs": keep_after}
    before = {name: jax.config.values[name] for name in new}
    try:
        set_all(new)
        yield
    finally:
        set_all(before)


def set_all(values):
    compilation_cache.reset_cache()  # it keeps the folder of its first use
    for name, value in values.items():
        jax.config.update(name, value)


@pytest.fixture
def found():
    """A list that grows with every executable that is found."""
    events = []

    def listen(event, **_):
        if event == programs.FOUND:
            events.append(event)

    jax.monitoring.register_event_listener(listen)
    yield events
    jax.monitoring.unregister_event_listener(listen)


def new_generator(seed=0):
    return generate.Generator(Infinity(CONFIG, rngs=nnx.Rngs(seed)))


def draw(generator, plan=None, **options):
    features = jax.random.normal(jax.random.key(1), (1, 5, 128))
    condition = embed(generator.model, features, jnp.array([4]))
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    plan = plan or dense_plan(SCHEDULE, 2)
    return np.asarray(
        generator.run(plan, condition, controls, sampling.image_keys(3, 1), **options)[0]
    )


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def test_kept_steps_draw_the_same_with_any_weights(folder, found):
    first = draw(new_generator())
    kept = contents(folder)
    assert (len(kept), len(found)) == (2, 0)
    again, other = draw(new_generator()), draw(new_generator(seed=1))
    assert len(found) == 4
    assert contents(folder) == kept
    np.testing.assert_array_equal(again, first)
    assert not np.array_equal(other, first)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b[:-9] + b"\0" * 9, lambda b: b""]
)
def test_damaged_files_are_compiled_anew(folder, found, damage):
    first = draw(new_generator())
    for file in folder.iterdir():
        file.write_bytes(damage(file.read_bytes()))
    np.testing.assert_array_equal(draw(new_generator()), first)
    assert not found
    np.testing.assert_array_equal(draw(new_generator()), first)
    assert len(found) == 2


@pytest.mark.gpu
def test_programs_of_jaxs_cache_are_kept_as_well(tmp_path, found):
    with configured(tmp_path, keep_after=0):
        first = draw(new_generator())
        shutil.rmtree(tmp_path / "programs")
        jax.clear_caches()
        np.testing.assert_array_equal(draw(new_generator()), first)
        assert not found
        np.testing.assert_array_equal(draw(new_generator()), first)
        assert len(found) == 2


def test_a_folder_that_cannot_be_written_is_no_error(folder):
    folder.write_text("a file where the folder should be")
    assert np.isfinite(draw(new_generator())).all()


@dataclasses.dataclass(frozen=True)
class Foreign(Dense):
    """An attention of somebody else's: its code may change where our key sees nothing."""


def test_what_changes_a_program_changes_its_key(folder, monkeypatch):
    def place(config=CONFIG, plan=None, how="sample", batch=1):
        model = nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0)))  # shapes are enough
        generator = generate.Generator(model)
        plan, seen = plan or dense_plan(FOLLOWED, 2), []
        monkeypatch.setattr(steps, "compile_traced", lambda traced, file: seen.append(file))
        text = jnp.ones((batch, 5, 128)), jnp.full(batch, 4)
        condition = jax.eval_shape(lambda m: m.embed_condition(*text, "learned"), model)
        generator.compile(plan, condition, batch, how=how)
        return seen[1]

    usual = place()
    assert place() == usual
    others = {
        place(how="greedy"),
        place(batch=2),
        place(config=dataclasses.replace(CONFIG, dtype="bfloat16")),
        place(plan=dense_plan(ScaleSchedule.of(((1, 1), (2, 2), (4, 5))), 2)),
        place(plan=dense_plan(FOLLOWED, 2, merge_at=1)),
    }
    with jax.default_matmul_precision("highest"):
        others.add(place())
    monkeypatch.setattr(programs, "_environment", lambda: "other sources")
    others.add(place())
    assert len(others - {usual, None}) == 7


def test_code_of_other_packages_is_not_kept(folder, monkeypatch):
    plan = dense_plan(SCHEDULE, 2)
    segments = [dataclasses.replace(plan.steps[0].segments[0], attention=Foreign())]
    steps = [dataclasses.replace(step, segments=tuple(segments)) for step in plan.steps]
    draw(new_generator(), dataclasses.replace(plan, steps=tuple(steps)))
    assert not folder.exists()


def test_nothing_is_kept_beside_kernels_of_other_packages(folder):
    """They may serve any step, and the key would not see them change."""
    added = backends.Backend("added", lambda call: "serves nothing", lambda call: None)
    with backends.register("attention", added):
        draw(new_generator())
    assert not folder.exists()


@pytest.mark.parametrize(
    "name",
    ["sparvar-paper", "sparvar-fast+drop_uncond(1)", "adaptive(coverage=0.8)+skip_last_scales(1)"],
)
def test_every_plan_of_ours_is_keyed(name):
    plan = parse_plan(name, infinity_schedule(), 4)
    for index in range(len(plan.steps)):
        assert programs._text(step_spec(plan, index, logit_bound=8.0))


def test_sources_are_part_of_the_key(tmp_path, monkeypatch):
    usual = programs._environment()
    copy = tmp_path / "sparvar_jax" / "runtime" / "programs.py"
    copy.parent.mkdir(parents=True)
    copy.write_text(pathlib.Path(programs.__file__).read_text() + "\n# changed\n")
    programs._environment.cache_clear()
    monkeypatch.setattr(programs, "__file__", str(copy))
    changed = programs._environment()
    programs._environment.cache_clear()
    assert changed != usual


def test_where_lowering_is_quick_nothing_is_kept(folder, monkeypatch):
    monkeypatch.setattr(programs, "KEPT_ON", ("tpu",))
    draw(new_generator())
    assert not folder.exists()


def test_programs_that_call_back_into_python_are_not_kept(folder):
    """They cannot be serialised on a GPU; whatever the serialiser says, the picture is drawn."""

    class Refusing:
        def __getattr__(self, name):
            raise AttributeError("Can't pickle local object")

    programs.keep(folder / "some.bin", Refusing())
    assert not folder.exists()


def test_folders_and_files_that_others_may_write_are_not_loaded(folder, found):
    first = draw(new_generator())
    assert {path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir())} == {0}
    folder.chmod(0o777)
    np.testing.assert_array_equal(draw(new_generator()), first)
    assert not found
    folder.chmod(0o700)
    for file in folder.iterdir():
        moved = file.rename(folder.parent / file.name)
        file.symlink_to(moved)
    np.testing.assert_array_equal(draw(new_generator()), first)
    assert not found


def test_a_cache_that_is_an_address_holds_no_executables_of_ours(monkeypatch):
    monkeypatch.setattr(programs, "KEPT_ON", ("cpu", "gpu"))
    traced = jax.jit(lambda x: x + 1).trace(1.0)
    with configured("gs://bucket/cache", keep_after=1e9):
        assert programs.place("outline", None, traced) is None


class Planted:
    """What a pickle runs when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return pathlib.Path.touch, (self.target,)


def test_a_planted_file_runs_no_code(folder, found, tmp_path):
    """Its digest lies in the file itself, so that it is right."""
    first = draw(new_generator())
    target = tmp_path / "ran"
    payload = pickle.dumps((Planted(target), None, None))
    for file in folder.iterdir():
        file.write_bytes(hashlib.sha256(payload).digest() + payload)
    np.testing.assert_array_equal(draw(new_generator()), first)
    assert not target.exists()
    assert not found
    pickle.loads(payload)
    assert target.exists()
