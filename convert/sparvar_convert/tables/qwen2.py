"""Names of Qwen2 language models in Hugging Face checkpoints.

Folders of HART's text encoder may still hold the vision tower of the Qwen2-VL it was taken from.
"""

from sparvar_convert.rules import TRANSPOSE, Ignore, Rule, Table

_LAYER, _BLOCK = "model.layers.{i}.", "blocks.{i}."
_RULES = (
    Rule("model.embed_tokens.weight", "embed"),
    Rule(_LAYER + "input_layernorm.weight", _BLOCK + "attn_norm.scale"),
    Rule(_LAYER + "post_attention_layernorm.weight", _BLOCK + "mlp_norm.scale"),
    Rule(_LAYER + "self_attn.{name:[qkvo]}_proj.weight", _BLOCK + "attn.{name}.kernel", TRANSPOSE),
    Rule(_LAYER + "self_attn.{name:[qkv]}_proj.bias", _BLOCK + "attn.{name}.bias"),
    Rule(_LAYER + "mlp.{name:gate|up|down}_proj.weight", _BLOCK + "{name}.kernel", TRANSPOSE),
    Rule("model.norm.weight", "final_norm.scale"),
)
_IGNORED = (
    Ignore("visual.{rest:.+}", "the vision tower: prompts are text alone"),
    Ignore("lm_head.weight", "the output layer: no words are generated"),
)
TABLE = Table("qwen2", _RULES, _IGNORED)
