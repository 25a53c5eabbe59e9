"""Tasks on records of RGBA layers, as plans: what is seen (`?`), and what a diffusion transformer makes of it.

The list is ringweave's own: combinations of words, background, foreground, composite, mask, trimap and layers that one
record of layers gives without anybody's labels. It is not the list of OmniAlpha or of any other model.
`data.sources[].tasks` of a config names tasks; `layer_views.py` says what each view shows, and which records cannot
give it.

No numpy is imported here: a config is checked against this table.
"""

from __future__ import annotations

import difflib

Plan = tuple[str, ...]

#: Words alone.
GENERATION: dict[str, Plan] = {
    "text_to_composite": ("caption?", "latents:composite"),
    "text_to_layers": ("caption?", "latents:layers"),
    "text_to_background": ("caption?", "latents:background"),
    "text_to_foreground": ("caption?", "latents:foreground"),
    "text_to_background_and_foreground": ("caption?", "latents:background", "latents:foreground"),
    "text_and_mask_to_foreground": ("caption?", "latents:mask?", "latents:foreground"),
    "text_and_mask_to_composite": ("caption?", "latents:mask?", "latents:composite"),
}
#: Some layers are there, others are to be made.
COMPLETION: dict[str, Plan] = {
    "background_to_composite": ("caption?", "latents:background?", "latents:composite"),
    "background_to_foreground": ("caption?", "latents:background?", "latents:foreground"),
    "background_and_mask_to_foreground": (
        "caption?", "latents:background?", "latents:mask?", "latents:foreground",
    ),
    "foreground_to_background": ("caption?", "latents:foreground?", "latents:background"),
    "foreground_to_composite": ("caption?", "latents:foreground?", "latents:composite"),
    "lower_layers_to_top_layer": ("caption?", "latents:lower?", "latents:top"),
    "lower_layers_and_mask_to_top_layer": ("caption?", "latents:lower?", "latents:top_mask?", "latents:top"),
}  # fmt: skip
#: What lies on the background is cut out, with its alpha.
MATTING: dict[str, Plan] = {
    "matting": ("latents:composite?", "latents:foreground"),
    "matting_with_text": ("caption?", "latents:composite?", "latents:foreground"),
    "matting_with_mask": ("latents:composite?", "latents:mask?", "latents:foreground"),
    "matting_with_trimap": ("latents:composite?", "latents:trimap?", "latents:foreground"),
    "matting_with_background": ("latents:composite?", "latents:background?", "latents:foreground"),
    "matting_to_alpha": ("latents:composite?", "latents:alpha"),
    "matting_to_alpha_with_trimap": ("latents:composite?", "latents:trimap?", "latents:alpha"),
    "matting_to_alpha_with_text": ("caption?", "latents:composite?", "latents:alpha"),
    "matting_to_mask": ("latents:composite?", "latents:mask"),
    "matting_to_alpha_with_mask": ("latents:composite?", "latents:mask?", "latents:alpha"),
}
#: What lies on the background is taken away, and what it hid is filled in.
REMOVAL: dict[str, Plan] = {
    "removal": ("latents:composite?", "latents:background"),
    "removal_with_text": ("caption?", "latents:composite?", "latents:background"),
    "removal_with_mask": ("latents:composite?", "latents:mask?", "latents:background"),
    "removal_with_trimap": ("latents:composite?", "latents:trimap?", "latents:background"),
    "removal_with_foreground": ("latents:composite?", "latents:foreground?", "latents:background"),
    "removal_of_top_layer_with_mask": ("latents:composite?", "latents:top_mask?", "latents:removed"),
}
#: A flat picture is taken apart.
DECOMPOSITION: dict[str, Plan] = {
    "decomposition": ("latents:composite?", "latents:layers"),
    "decomposition_with_text": ("caption?", "latents:composite?", "latents:layers"),
    "decomposition_with_mask": ("latents:composite?", "latents:mask?", "latents:layers"),
    "decomposition_in_two": ("latents:composite?", "latents:background", "latents:foreground"),
    "decomposition_in_two_with_text": (
        "caption?", "latents:composite?", "latents:background", "latents:foreground",
    ),
    "decomposition_in_two_with_trimap": (
        "latents:composite?", "latents:trimap?", "latents:background", "latents:foreground",
    ),
    "decomposition_of_top_layer": ("latents:composite?", "latents:removed", "latents:top"),
}  # fmt: skip
#: Layers are put together.
RECOMPOSITION: dict[str, Plan] = {
    "recomposition": ("latents:layers?", "latents:composite"),
    "recomposition_of_two": ("latents:background?", "latents:foreground?", "latents:composite"),
}

#: All of them, by name.
TASKS: dict[str, Plan] = {
    **GENERATION, **COMPLETION, **MATTING, **REMOVAL, **DECOMPOSITION, **RECOMPOSITION,
}  # fmt: skip


def plan_of_task(name: str) -> Plan:
    """The plan of a task. ValueError for a name that is not in the table gives the nearest one."""
    if name in TASKS:
        return TASKS[name]
    near = difflib.get_close_matches(name.lower(), TASKS, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ValueError(f"there is no task {name[:60]!r}{hint}")
