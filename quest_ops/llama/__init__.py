"""The reference decoder: Llama-family weights, tokenizers, model and generation on top of QuestAttention."""
