"""ringweave.json of an exported diffusion run, field by field: what is damaged or hostile is named before it is used.

Every function takes the object of the file as JSON gives it, so any value may be of any type, NaN or without bounds.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, get_args

from ringweave.pretrain.flow import FlowSettings, Sampler, Shift, Weighting
from ringweave.pretrain.models.dit import DiTShape
from ringweave.pretrain.models.dit_positions import PRESETS
from ringweave.pretrain.models.lwm import LWMShape
from ringweave.tokenizers.errors import VocabularyError
from ringweave.tokenizers.latent_codec import LatentCodec
from ringweave.tokenizers.manifest import BOS, EOS, PAD

#: Of ringweave.json; those behind the first line tell people and programs about the run, and nothing is made of them.
KEYS = frozenset({
    "format", "preset", "sign", "axes", "words", "head", "zero_init", "latents", "flow", "prompts",
    "documents", "stock_cannot", "step", "average", "vocabulary", "stock_sources",
})  # fmt: skip
#: Sizes that a file may ask for, tokens of a document it may speak of, and the largest logarithm of a shift.
MOST, MOST_TOKENS, MOST_MU = 1 << 24, 1 << 40, 100.0
#: Characters of a key that a message shows.
_SHOWN = 60


def damaged(key: str, value: Any, wanted: str, *, where: str, fix: str = "") -> VocabularyError:
    """`flow.std is -1, and ... was expected`."""
    return VocabularyError(
        f"{key} is {_brief(value)}", where=where, why=f"{wanted} was expected",
        fix=fix or "export the run again: ringweave export RUN",
    )  # fmt: skip


def _brief(value: Any) -> str:
    """The beginning of a value of any size and depth."""
    return reprlib.repr(value)


def whole(value: Any, least: int, most: int = MOST) -> bool:
    """Whether it is a whole number (no boolean) within bounds."""
    return type(value) is int and least <= value <= most


def number(value: Any, most: float = 1e6) -> bool:
    """Whether it is a finite number (no boolean), at most so large. Whole numbers of any length are compared safely."""
    return type(value) in (int, float) and -most <= value <= most


def check_fields(about: Mapping[str, Any], *, where: str) -> None:
    """VocabularyError for keys this version does not know, and for how layers and prompts are counted."""
    unknown = sorted(about.keys() - KEYS)
    if unknown:
        shown = ", ".join(repr(key[:_SHOWN]) for key in unknown[:4])
        raise VocabularyError(
            f"this version does not know the key {shown}", where=where,
            why="what it says of the model would be passed over",
            fix="take a newer ringweave, or export the run again",
        )  # fmt: skip
    preset, sign = about.get("preset"), about.get("sign")
    if type(preset) is not str or preset not in PRESETS or type(sign) is not int or abs(sign) != 1:
        raise VocabularyError(
            "the file does not say how layers are numbered", where=where,
            why=f"preset is {_brief(preset)}, sign {_brief(sign)}",
        )  # fmt: skip
    for name in ("head", "zero_init"):
        if name in about and type(about[name]) is not bool:
            raise damaged(name, about[name], "true or false", where=where)
    if "flow" in about:
        flow_of(about, where=where)
    if about.get("words") is not None:
        words_of(about["words"], where=where)
    prompts = about.get("prompts", {"begin_with": BOS})
    if not isinstance(prompts, dict):
        raise damaged("prompts", prompts, "an object", where=where)
    begin = prompts.get("begin_with")
    if type(begin) is not int or begin != BOS:
        raise damaged(
            "prompts.begin_with", begin, f"{BOS}, with which ringweave's prompts begin,", where=where
        )


def flow_of(about: Mapping[str, Any], *, where: str) -> FlowSettings:
    """The settings of noise levels. VocabularyError names the first that is missing, unknown or no such setting."""
    flow = about.get("flow")
    if not isinstance(flow, dict):
        raise damaged("flow", flow, "an object of settings", where=where)
    known = {field.name for field in fields(FlowSettings)}
    for name in sorted(flow.keys() ^ known):
        said = "this version does not know" if name in flow else "the file lacks"
        raise VocabularyError(f"{said} the setting flow.{name[:_SHOWN]}", where=where)
    for name, words in (("sampler", Sampler), ("shift", Shift), ("weighting", Weighting)):
        if type(flow[name]) is not str or flow[name] not in get_args(words):
            raise damaged(f"flow.{name}", flow[name], f"one of {', '.join(get_args(words))}", where=where)
    for name in ("mean", "std", "scale"):
        if not number(flow[name]) or (name == "std" and flow[name] <= 0):
            wanted = "a number above 0" if name == "std" else "a number"
            raise damaged(f"flow.{name}", flow[name], wanted, where=where)
    if not whole(flow["shift_base"], 1, MOST_TOKENS):
        raise damaged("flow.shift_base", flow["shift_base"], "a number of tokens", where=where)
    ends = {name: _end(flow[name], f"flow.{name}", where) for name in ("shift_from", "shift_to")}
    if flow["shift"] == "exponential" and ends["shift_from"][0] == ends["shift_to"][0]:
        raise damaged(
            "flow.shift_to", flow["shift_to"], "another number of tokens than in shift_from", where=where
        )
    return FlowSettings(**{**flow, **ends})


def _end(value: Any, key: str, where: str) -> tuple[int, float]:
    """One end of the line of shifts."""
    pair: list[Any] = value if isinstance(value, list) and len(value) == 2 else [None, None]
    if not whole(pair[0], 1, MOST_TOKENS) or not number(pair[1], MOST_MU):
        raise damaged(key, value, f"[tokens, mu of at most {MOST_MU:g}]", where=where)
    return pair[0], pair[1]


def words_of(words: Any, *, where: str) -> LWMShape:
    """Sizes of the words' model. VocabularyError unless they make sense."""
    if not isinstance(words, dict):
        raise damaged("words", words, "an object of sizes", where=where)
    known = {field.name for field in fields(LWMShape)}
    what = "the sizes of the words' model are damaged"
    for name in sorted(words.keys() ^ known):
        said = "not known" if name in words else "missing"
        raise VocabularyError(what, where=where, why=f"words.{name[:_SHOWN]} is {said}")
    least = {"layers": 0, "vocab": max(BOS, EOS, PAD) + 1}
    for name, value in words.items():
        if name == "window":
            sound, wanted = value is None, "null"
        elif name == "norm_eps":
            sound, wanted = type(value) is float and number(value, 1.0) and value > 0, "a number above 0"
        else:
            most = 1024 if name == "layers" else MOST
            low = least.get(name, 1)
            sound, wanted = whole(value, low, most), f"a whole number from {low} to {most}"
        if not sound:
            raise VocabularyError(what, where=where, why=f"words.{name} is {_brief(value)}, not {wanted}")
    heads, width = words["heads"], words["width"]
    if width % heads or (width // heads) % 2 or heads % words["kv_heads"]:
        why = f"words.width is {width}, words.heads {heads}, words.kv_heads {words['kv_heads']}: no even whole heads"
        raise VocabularyError(what, where=where, why=why)
    return LWMShape(**words)


def check_against(about: Mapping[str, Any], shape: DiTShape, *, where: str) -> None:
    """VocabularyError where the file speaks of another transformer or of other latents than those beside it."""
    axes = about.get("axes", list(shape.axes))
    if not _same(axes, shape.axes):
        raise damaged("axes", axes, f"{list(shape.axes)}, as transformer/config.json has it,", where=where)
    latents = about.get("latents", {})
    if not isinstance(latents, dict):
        raise damaged("latents", latents, "an object", where=where)
    for name, wanted in (("channels", shape.channels), ("out", shape.out)):
        value = latents.get(name, wanted)
        if type(value) is not int or value != wanted:
            said = f"{wanted}, as the weights of the transformer have it,"
            raise damaged(f"latents.{name}", value, said, where=where)


def check_words(words: LWMShape | None, text: int, *, where: str) -> None:
    """VocabularyError unless the transformer reads vectors as wide as the words' model makes them."""
    if words is not None and words.width != text:
        raise damaged(
            "words.width", words.width, f"joint_attention_dim {text} of transformer/config.json", where=where
        )


def check_statistics(about: Mapping[str, Any], codec: LatentCodec, *, where: str) -> None:
    """VocabularyError unless the latents the model was trained on are those of the VAE beside it."""
    latents = about.get("latents", {})
    pairs: Sequence[tuple[str, Any]] = (
        ("patch", codec.patch), ("mean", codec.config["latents_mean"]), ("std", codec.config["latents_std"]),
    )  # fmt: skip
    for name, wanted in pairs:
        value = latents.get(name, wanted)
        if not _same(value if name != "patch" else [value], [wanted] if name == "patch" else wanted):
            raise damaged(
                f"latents.{name}", value, f"what vae/config.json has ({_brief(wanted)})", where=where,
                fix="put the VAE back that the run was trained with, or export the run again",
            )  # fmt: skip


def _same(given: Any, wanted: Sequence[float]) -> bool:
    """Whether a list holds these numbers, to rounding in float32."""
    if not isinstance(given, list) or len(given) != len(wanted):
        return False
    return all(
        number(g, 1e30) and math.isclose(g, w, rel_tol=1e-6, abs_tol=1e-9) for g, w in zip(given, wanted)
    )
