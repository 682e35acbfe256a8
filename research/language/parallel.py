"""Where the parameters of language models live on a mesh: rules for `research.core.sharding`, for all families.

Tensor parallelism as in Megatron-LM (Shoeybi et al. 2019): layers that read the residual stream are split by their
outputs (heads, hidden units), layers that write to it by their inputs, so each pair needs one sum over the devices; the
vocabulary is split where words are looked up and where they are scored.
"""

RULES = (
    (r"/(embed_tokens|shared|word_embeddings)/embedding$", "fsdp+tensor:0"),
    (r"/lm_head/kernel$", "fsdp+tensor:1"),
    (r"/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|intermediate|wi|wi_0|wi_1)/kernel$", "fsdp+tensor:1"),
    (r"/(q_proj|k_proj|v_proj|gate_proj|up_proj|fc1|intermediate)/bias$", "tensor:0"),
    (r"/(o_proj|down_proj|fc2|output|wo)/kernel$", "fsdp+tensor:0"),
    (r"", "fsdp"),
)
