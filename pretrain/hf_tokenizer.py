"""The text vocabulary as a transformers fast tokenizer, id for id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ringweave.tokenizers.text_export import transformers_config, write_tokenizer_json


def write_fast_tokenizer(tokenizers: Any, out: Path, *, context: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` for the text ids of a TokenizerSet.

    Raises VocabularyError when the result would not give the same ids as ours.
    """
    start = tokenizers.manifest.block("text").start
    write_tokenizer_json(tokenizers.codecs["text"], out / "tokenizer.json", start=start)
    config = json.dumps(transformers_config(context=context), indent=2)
    (out / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
