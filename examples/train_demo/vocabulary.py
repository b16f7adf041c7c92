"""Stage 2: the demo's own text tokenizer, a sentencepiece unigram model of its captions.

Run `python -m examples.train_demo.vocabulary`. Ids follow T5 (pad 0, end 1, unknown 2), so the
package's tokenizer and text encoder read the file as they read T5's.
"""

import io
from functools import lru_cache
from pathlib import Path

import numpy as np
import sentencepiece
from jaxtyping import Int

from examples.train_demo.build_archive import DATA
from examples.train_demo.captions import Picture, draw_example
from examples.train_demo.pictures import load

PIECES = 3072
MAX_LENGTH = 32
MODEL = DATA / "spiece.model"


def corpus(pictures: list[Picture], by_style: dict[str, np.ndarray], lines: int) -> list[str]:
    """Random captions, and every name and tag alone so that no word is missing."""
    rng = np.random.default_rng(1)
    captions = [draw_example(pictures, by_style, rng)[0] for _ in range(lines)]
    return captions + [p.name for p in pictures] + [t for p in pictures for t in p.tags]


def tokenise(
    model: sentencepiece.SentencePieceProcessor, captions: list[str]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    """Ids padded to 32 with the end token, and lengths."""
    ids = np.zeros((len(captions), MAX_LENGTH), np.int32)
    lengths = np.zeros(len(captions), np.int32)
    for row, pieces in enumerate(model.encode(captions)):
        pieces = [*pieces[: MAX_LENGTH - 1], model.eos_id()]
        ids[row, : len(pieces)] = pieces
        lengths[row] = len(pieces)
    return ids, lengths


@lru_cache
def read(path: Path = MODEL) -> sentencepiece.SentencePieceProcessor:
    """The trained tokenizer."""
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def main() -> None:
    """Train the tokenizer and print how long captions become."""
    collection, _ = load()
    lines = corpus(collection.pictures, collection.by_style(collection.train), 40_000)
    buffer = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=buffer,
        vocab_size=PIECES,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        hard_vocab_limit=False,
        character_coverage=1.0,
        minloglevel=2,
    )
    MODEL.write_bytes(buffer.getvalue())
    model = read()
    _, lengths = tokenise(model, lines[:20_000])
    print(
        f"{model.vocab_size()} pieces, {MODEL.stat().st_size / 1e3:.0f} kB; caption length "
        f"mean {lengths.mean():.1f}, 99 % {np.percentile(lengths, 99):.0f}, max {lengths.max()}"
    )


if __name__ == "__main__":
    main()
