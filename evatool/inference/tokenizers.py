"""The tokenizer that a model was trained with, from what its configuration says of it."""

from __future__ import annotations

import json
from typing import Any

from evatool.core.errors import DependencyError
from evatool.data.tokenizer import Tokenizer, build_tokenizer
from evatool.model.config import ModelConfig

CLIP_BPE = "clip-bpe"


def tokenizer_facts(config: ModelConfig) -> dict[str, Any]:
    """What distinguishes the model's tokenizer from CLIP's byte pairs; empty for those."""
    if config.open_clip is None:
        return {}
    text = config.open_clip["text_cfg"]
    keys = ("hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs")
    return {key: text[key] for key in keys if text.get(key)}


def tokenizer_key(config: ModelConfig) -> str:
    """Equal for two models if and only if the same captions give them the same ids."""
    facts = tokenizer_facts(config)
    return f"{json.dumps(facts, sort_keys=True) if facts else CLIP_BPE}/{config.context_length}"


def tokenizer_of(config: ModelConfig) -> Tokenizer:
    """Captions -> ids (B, L) int64 as the model was trained on them.

    Raises: DependencyError where the tokenizer's files or its package are not at hand.
    """
    facts = tokenizer_facts(config)
    if not facts:
        return build_tokenizer(config.context_length)
    from open_clip.tokenizer import HFTokenizer, SimpleTokenizer

    options = {"context_length": config.context_length, **facts.get("tokenizer_kwargs", {})}
    name = facts.get("hf_tokenizer_name")
    if name is None:
        simple: Tokenizer = SimpleTokenizer(**options)
        return simple
    try:
        found: Tokenizer = HFTokenizer(name, tokenizer_mode=facts.get("tokenizer_mode"), **options)
        return found
    except Exception as error:  # transformers raises whatever its readers raise
        raise DependencyError(
            f"the tokenizer of {config.name}, {name}, cannot be read: {(str(error).splitlines() or [''])[0][:300]}",
            where="text_cfg.hf_tokenizer_name",
            expected="a folder with tokenizer.json or a SentencePiece model, or the network",
            fix="put the tokenizer's files beside the weights, and pip install 'evatool[transformers]'",
        ) from error
