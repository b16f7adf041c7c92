"""What `import sparvar_jax` offers, and a policy that lives in one file outside the package."""

import subprocess
import sys
import textwrap

import pytest

import sparvar_jax
from sparvar_jax import cli
from sparvar_jax.policies import registry
from tests.tiny_model import write_tiny_model

POLICY = '''
"""An attention policy of a user: every key but the sinks is seen through a window of one scale."""

import dataclasses

import jax

import pallas_kernels
from sparvar_jax import Output, ReadsAll, map_attention, register_policy


@dataclasses.dataclass(frozen=True)
class OwnScale(ReadsAll):
    """Attention to the scale being drawn alone."""

    name = "own scale"
    layouts = ("packed",)

    def pairs(self, place):
        return float(place.scale.tokens**2)

    def scales(self, place):
        return frozenset({place.index})

    def __call__(self, view, q, place, state):
        first, last = place.scale.offset, place.scale.end
        k, v = (x[:, :, first:last] for x in view)
        return Output(pallas_kernels.attention(q, k, v, last - first, implementation="xla"))


def own_scale(last: int = 1):
    """See nothing but the own scale in the last scales."""

    def apply(plan):
        first = len(plan.schedule) - last
        return map_attention(
            plan, lambda step, layer: OwnScale() if step.scale.index >= first else None
        )

    return apply


register_policy("own-scale", own_scale)
'''


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "POLICIES", dict(registry.POLICIES))
    path = tmp_path / "my_policy.py"
    path.write_text(POLICY)
    return path


def test_every_name_of_the_face_is_there_and_listed():
    for name in sparvar_jax.__all__:
        assert getattr(sparvar_jax, name) is not None
    assert set(sparvar_jax.__all__) <= set(dir(sparvar_jax))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sparvar_jax.nothing


def test_a_plan_can_be_made_without_loading_checkpoint_libraries():
    code = textwrap.dedent(
        """
        import sys, sparvar_jax
        plan = sparvar_jax.dense_plan(sparvar_jax.infinity_schedule(), 4)
        assert plan.density() == 1
        print(sorted({"orbax", "flax", "safetensors", "tokenizers"} & set(sys.modules)))
        """
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_policy_of_one_file_is_used_by_name_from_the_command_line(file, tmp_path, capsys):
    call = ["--policies-from", str(file)]
    assert cli.main([*call, "plans", "own-scale(last=2)", "--size", "0.06M", "--depth", "2"]) == 0
    assert capsys.readouterr().out.count("own scale") == 2
    out, model = tmp_path / "picture.png", str(write_tiny_model(tmp_path / "model"))
    drawing = ["generate", "a red apple", "--size", "0.06M", "--plan", "own-scale+drop_uncond(1)"]
    drawing += ["--model", model]
    assert cli.main([*call, *drawing, "--out", str(out)]) == 0
    assert out.stat().st_size > 100


def test_files_that_cannot_be_run_are_one_line(tmp_path, capsys):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_that_name")
    for path, told in ((broken, "ModuleNotFoundError"), (tmp_path / "none.py", "is no file")):
        assert cli.main(["--policies-from", str(path), "plans"]) == 2
        error = capsys.readouterr().err
        assert told in error
        assert error.count("\n") == 1


def test_names_are_checked_and_never_taken_over(file):
    with pytest.raises(ValueError, match="already"):
        sparvar_jax.register_policy("csla", lambda: None)
    with pytest.raises(ValueError, match="small letters"):
        sparvar_jax.register_policy("Mine (1)", lambda: None)
    registry.load_policies(file)
    assert sparvar_jax.policies.parse_policy("own-scale(1)") is not None
