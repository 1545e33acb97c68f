"""A folder of transformers to be trained and served, and files of chats and of text."""

from __future__ import annotations

import json
from pathlib import Path

import torch

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "router_aux_loss_coef": 0.02,
    "dtype": "float32",
}


def chat(i: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What comes after {i}?"}, {"role": "assistant", "content": f"{i + 1} does."}]


def write(base: Path) -> Path:
    """Write ``model``, a small random Mixtral with a byte-level tokenizer and a chat template; a file of chats, and one
    of text."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    text = "".join(m["content"] + "\n" for i in range(40) for m in chat(i))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=len(fast), **SIZES))
    model.save_pretrained(base / "model"), fast.save_pretrained(base / "model")
    (base / "chats.jsonl").write_text("".join(json.dumps({"messages": chat(i)}) + "\n" for i in range(40)))
    (base / "text.txt").write_text(text.replace(".\n", ".\n\n"))
    return base
