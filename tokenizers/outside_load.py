"""One door to codecs brought from outside: a folder or file in, the wrapper of its kind out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ringweave.tokenizers import outside_audio, outside_latents
from ringweave.tokenizers.outside_audio import OutsideAudio
from ringweave.tokenizers.outside_files import read_config
from ringweave.tokenizers.outside_image import OutsideImage
from ringweave.tokenizers.outside_latents import OutsideLatents


def load_outside(path: Path, **options: Any) -> OutsideAudio | OutsideImage | OutsideLatents:
    """The codec stored at `path`, its class told by config.json; `options` are those of that class's `load`.

    What names neither an audio model nor a VAE is read as an image codec, which has a config of several styles or
    none. VocabularyError as `read_weights` and the class raise it.
    """
    config = read_config(Path(path))
    if config.get("model_type") in outside_audio.CLASSES:
        return OutsideAudio.load(path, **options)
    if config.get("_class_name") in outside_latents.CLASSES:
        return OutsideLatents.load(path, **options)
    return OutsideImage.load(path, **options)
