"""A pipeline that draws nothing, and only when it may: queues and answers can be watched."""

import threading
import types

import jax.numpy as jnp
import numpy as np

from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.pipeline import Pipeline

SCALES = 3
SIDE = 4
BROKEN = "a broken plate"


class ToyPipe(Pipeline):
    """Knows tokens, plans and sizes of a model without its weights. Pictures have the grey `seed`.

    gate: one release lets one scale pass. batches: seeds of every batch begun. asked, scales: how
    many scales were asked for, and how many were drawn.
    """

    def __init__(self, folder, *, gated=False):
        super().__init__(loading.describe_model(folder))
        self.gated, self.gate = gated, threading.Semaphore(0)
        self.batches, self.asked, self.scales = [], 0, 0

    def request(self, subject=None, **options):
        if BROKEN in subject:
            raise RuntimeError("the plate is broken")
        self.batches.append(list(options["seed"]))
        return types.SimpleNamespace(seeds=np.array(options["seed"]))

    def steps(self, request):
        for index in range(SCALES):
            self.asked += 1
            if self.gated:
                assert self.gate.acquire(timeout=30)
            self.scales += 1
            grey = jnp.asarray((request.seeds + index - SCALES + 1) % 256)
            yield types.SimpleNamespace(code_sum=grey), types.SimpleNamespace(tokens=grey)

    def pixels(self, code_sum):
        grey = code_sum[:, None, None, None].astype(jnp.uint8)
        return jnp.broadcast_to(grey, (len(code_sum), SIDE, SIDE, 3))
