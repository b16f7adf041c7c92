"""Names of the T5 encoder in Hugging Face checkpoints (T5, T5 v1.1, Flan-T5), full or encoder only.

Block 0 holds the table of relative position biases that all blocks share. `shared.weight` and
`encoder.embed_tokens.weight` are one tied tensor, and files hold either or both: `table_for` reads
it under the name that is there.
"""

from collections.abc import Iterable

from sparvar_convert.rules import TRANSPOSE, Ignore, Rule, Table

SHARED = "shared.weight"
TIED = "encoder.embed_tokens.weight"

_BLOCK = "encoder.block.{i}.layer."
_RULES = (
    Rule(
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "relative_bias",
    ),
    Rule(
        _BLOCK + "0.SelfAttention.{name:[qkvo]}.weight",
        "blocks.{i}.attn.{name}.kernel",
        TRANSPOSE,
    ),
    Rule(_BLOCK + "0.layer_norm.weight", "blocks.{i}.attn_norm.scale"),
    Rule(
        _BLOCK + "1.DenseReluDense.{name:wi|wi_0|wi_1|wo}.weight",
        "blocks.{i}.ffn.{name}.kernel",
        TRANSPOSE,
    ),
    Rule(_BLOCK + "1.layer_norm.weight", "blocks.{i}.ffn_norm.scale"),
    Rule("encoder.final_layer_norm.weight", "final_norm.scale"),
)
_IGNORED = (
    Ignore("decoder.{rest:.+}", "the decoder: pictures are conditioned on the encoder alone"),
    Ignore("lm_head.weight", "the language model's output layer: belongs to the decoder"),
)


def table_for(keys: Iterable[str]) -> Table:
    """Table for a checkpoint with these keys: the tied embedding is read exactly once."""
    if SHARED in set(keys):
        embed, twin = SHARED, (Ignore(TIED, "the same tensor as shared.weight"),)
    else:
        embed, twin = TIED, ()
    return Table("t5", (Rule(embed, "embed"), *_RULES), (*twin, *_IGNORED))


TABLE = table_for((SHARED,))
