"""More layers for a trained transformer, which draws what it drew until they have learnt something.

A new layer is a copy of the one before it whose three branches end in zeros (after Net2Net, arXiv
1511.05641): what it adds is nothing at first, and its last products learn from the first step on.
"""

import re

import numpy as np

LAYER = re.compile(r"(?P<before>.*\bblocks\.)(?P<index>\d+)(?P<after>\..*)")
LAST_PRODUCTS = re.compile(r"\b(attn\.proj|cross\.proj|ffn\.fc2)\.(kernel|bias)$")


def places(old: int, new: int) -> list[tuple[int, bool]]:
    """For every layer of the deeper model: which layer it comes from, and whether it is new.

    New layers lie evenly among the old ones. Raises ValueError where there are more of them than
    old ones, or fewer layers than before.
    """
    more = new - old
    if not 0 <= more <= old:
        raise ValueError(f"{old} layers can become {old} to {2 * old}, not {new}")
    after = {(number + 1) * old // more - 1 for number in range(more)}
    found = []
    for layer in range(old):
        found += [(layer, False), (layer, True)] if layer in after else [(layer, False)]
    return found


def deepened(params: dict[str, np.ndarray], depth: int) -> dict[str, np.ndarray]:
    """Parameters by dotted path, with as many transformer blocks as `depth`."""
    layers: dict[int, dict[tuple[str, str], np.ndarray]] = {}
    rest = {}
    for path, array in params.items():
        found = LAYER.fullmatch(path) if path.startswith("transformer.") else None
        if found is None:
            rest[path] = array
        else:
            layer = layers.setdefault(int(found["index"]), {})
            layer[found["before"], found["after"]] = array
    for index, (source, new) in enumerate(places(len(layers), depth)):
        for (before, after), array in layers[source].items():
            ends = new and LAST_PRODUCTS.search(after)
            rest[f"{before}{index}{after}"] = np.zeros_like(array) if ends else array
    return rest
