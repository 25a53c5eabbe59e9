"""`tokenizer train --size KEY=VALUE`: the numbers of `FitSizes` from the command line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ringweave.pretrain.errors import ConfigError

if TYPE_CHECKING:
    from ringweave.tokenizers.fit import FitSizes


CHOICES = {"text_model": ("bpe", "unigram"), "audio_order": ("frame-major", "coarse-first", "delay")}


def parse_sizes(settings: Sequence[str]) -> FitSizes:
    """`FitSizes` with `key=value` settings. ConfigError names an unknown key, with the nearest known one, or a value
    that is not of its kind."""
    from difflib import get_close_matches

    from ringweave.tokenizers.fit import FitSizes

    defaults = {field.name: field.default for field in fields(FitSizes)}
    changed: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if key not in defaults or not equals:
            near = get_close_matches(key, defaults, n=1)
            raise ConfigError(
                f"--size has no setting {key!r}",
                fix=f"did you mean {near[0]}?" if near else f"the settings are {', '.join(defaults)}",
            )
        changed[key] = _value(key, value, defaults[key])
    return FitSizes(**changed)


def _value(key: str, text: str, default: Any) -> Any:
    """`text` as what the default is. ConfigError."""
    if isinstance(default, bool):
        if text in ("true", "false"):
            return text == "true"
        raise ConfigError(f"--size {key} is true or false, not {text!r}")
    if key in CHOICES:
        if text in CHOICES[key]:
            return text
        raise ConfigError(f"--size {key} is one of {', '.join(CHOICES[key])}, not {text!r}")
    if isinstance(default, int):
        # 16K counts in thousands, as budgets of tokens do in configs.
        scale = {"K": 1000, "M": 1_000_000}.get(text[-1:], 1)
        digits = text.removesuffix("K").removesuffix("M")
        if digits.isdecimal() and (int(digits) > 0 or key == "video_key_every"):
            return int(digits) * scale
        raise ConfigError(f"--size {key} is a whole number above 0, not {text!r}")
    return text
