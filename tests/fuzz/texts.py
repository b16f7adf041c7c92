"""Plan texts, command lines and values of options, right and wrong, as Hypothesis makes them."""

from __future__ import annotations

import hypothesis.strategies as st

_NAMES = (
    "dense", "sparvar-paper", "sparvar-fast", "csla", "cs4a", "sparvar", "adaptive",
    "skip_last_scales", "drop_uncond", "nope", "__import__", "lambda",
)  # fmt: skip
_ARGUMENTS = (
    "windows", "sinks", "form", "exact", "block", "first_scale", "layers", "keep", "group",
    "multiple", "granularity", "cache", "mapping", "decision_scale", "coverage", "cap", "floor",
    "count", "boundary", "columns_options", "implementation", "self",
)  # fmt: skip
_LITERALS = (
    "0", "1", "2", "3", "-1", "-3", "1.0", "0.5", "0.001", "1e999", "-1e999", "10**9", "True",
    "None", "'x'", "'boxes'", "'blocks'", "'relative'", "'scale'", "[]", "[1]", "(1,)",
    "(0, 1)", "(0.1, 0.9)", "(-1, 3, 5)", "[-1, 1, 3]", "{}", "{'keep': 0.1}",
    "{'granularity': 8, 'multiple': 64}", "{1: 2}", "8", "64", "128", "99999999999999999999",
    "1048576", "()", "((1, 2), (3, 4))", "b'x'", "1j", "...", "x", "f()", "[[[]]]", "'\\d'",
    "-----1", "(", ")", "1_000", "0x10", "nan", "*[1]", "**{}",
)  # fmt: skip


def plans() -> st.SearchStrategy[str]:
    """Policies joined by plus signs, or any text."""
    literal = st.sampled_from(_LITERALS)
    named = st.tuples(st.sampled_from(_ARGUMENTS), literal).map("=".join)
    arguments = st.lists(st.one_of(literal, named), max_size=3).map(", ".join)
    call = st.tuples(st.sampled_from(_NAMES), arguments).map(lambda c: f"{c[0]}({c[1]})")
    policy = st.one_of(st.sampled_from(_NAMES), call, call)
    joined = st.lists(policy, min_size=1, max_size=3).map("+".join)
    letters = st.tuples(
        st.sampled_from(_RIGHT), st.integers(0, 60), st.integers(0, 3), st.text(max_size=2)
    ).map(lambda c: c[0][: c[1]] + c[3] + c[0][c[1] + c[2] :])
    return st.one_of(joined, letters, letters, st.text(max_size=40))


_WORDS = (
    "0", "1", "-1", "2", "1.5", "nan", "inf", "-inf", "1e309", "9" * 30, "9" * 400, "9" * 5000,
    "", " ", "x", "1:1", "0:1", "16:9", "1:nan", "9999:1", "off", "1M", "0.06M", "dense",
    "csla(", "adaptive(None)", "0-9", "0-99999999999", "1,2,3,4", "-5,0,9,9", "all", "HERE",
    "HERE/a.png", "HERE/a.json", "HERE/none/b.png", "/dev/null", "\x1b[31m", "\u202eabc",
    "\ud800", "[red]", "[/red]", "float32", "--", "-x", "a" * 3000,
)  # fmt: skip
_RIGHT = (
    "dense", "sparvar-paper", "sparvar-fast + drop_uncond(2)", "csla(sinks=2, form='boxes')",
    "csla(windows=(-1, 1, 3), first_scale=-2, layers=(0, 2))", "cs4a(keep=0.3, group=64)",
    "cs4a(-2, granularity=8, multiple=64, mapping='relative')", "adaptive(0.8, cap=0.5, block=64)",
    "sparvar(0.5, columns_options={'keep': 0.1}, sinks=1)", "skip_last_scales(2)+drop_uncond(3)",
)  # fmt: skip
_OPTIONS = {
    "plans": "--depth --aspect --size",
    "generate": "--out --plan --seed --num --guidance --temperature --negative --aspect --size "
    "--class --dtype",
    "demo": "--out --plan --seed --aspect --size --dtype",
    "edit": "--out --box --mask --class --keep-scales --seed --guidance",
    "sample": "--out --classes --per-class --batch --seed --top-k --top-p",
    "info": "--plan --num --aspect --size --dtype",
    "inspect": "--out --plan --seed --aspect --size",
    "warmup": "--plan --num --aspect --size --guidance --prompt",
    "convert": "--into --kind --export --part --ema",
    "compare": "--converted --out --size --aspect --guidance --seed --tolerance",
    "nope": "--help",
}


def lines() -> st.SearchStrategy[list[str]]:
    """Commands with right and wrong options; those that draw find no model."""

    def of(command: str) -> st.SearchStrategy[list[str]]:
        pair = st.tuples(st.sampled_from(_OPTIONS[command].split()), st.sampled_from(_WORDS))
        rest = st.lists(pair, max_size=4).map(lambda pairs: [word for p in pairs for word in p])
        first = st.lists(st.sampled_from(_WORDS), max_size=1)
        draws = command in ("generate", "demo", "edit", "sample", "info", "inspect", "warmup")
        model = ["--model", "HERE/none"] if draws else []
        return st.tuples(first, rest).map(lambda both: [command, *both[0], *both[1], *model])

    return st.sampled_from(sorted(_OPTIONS)).flatmap(of)


_VALUES = (
    None, True, False, 0, 1, -1, 3, 2.0, 2.7, -0.0, 1e-300, 1e300, float("nan"), float("inf"),
    10**30, 10**400, 2**32, 2**63, "", "x", "2.5", "off", "1:1", "9" * 5000, "1M", "0.06M",
    "dense", "\ud800", [], [1], [1.0] * 7, [None] * 7, [[1]], ["x"], {}, {"a": 1}, b"1", 1j,
    (1, 2), "skip_last_scales(1)",
)  # fmt: skip
_CALLS = (
    "seed", "ratio", "guidance", "temperature", "top_p", "top_k", "plan", "size",
    "aspect_ratio", "guidance_layer",
)  # fmt: skip


def calls() -> st.SearchStrategy[tuple]:
    """(option, value)."""
    value = st.one_of(st.sampled_from(_VALUES), st.integers(), st.floats(), st.text(max_size=9))
    return st.tuples(st.sampled_from(_CALLS), value)
