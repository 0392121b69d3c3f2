"""Settings of drawing that were published, by name, each with where they stand.

guidance_scale is g in (1 + g) conditional - g unconditional: scripts that call w = g + 1 the scale are turned into it.
Where a model's figures were published without their settings, those of its inference script stand here, and the source
says so.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hermesflow.config import Config
from hermesflow.runtime.files import InputError


@dataclass(frozen=True, kw_only=True)
class Preset:
    """drawing: settings of [drawing]. source: repository and file. prompts: the list that goes with it, if another."""

    drawing: dict[str, float]
    source: str
    prompts: str = ""


_NO_PROTOCOL = "settings of its published scores are not published"
PRESETS = {
    "show-o": Preset(
        drawing={"num_steps": 50, "guidance_scale": 5.0, "temperature": 1.0},
        source=f"showlab/Show-o, README.md, inference_t2i.py at 512 pixels; {_NO_PROTOCOL} (issue 58)",
    ),
    "show-o2-geneval": Preset(
        drawing={"num_steps": 100, "guidance_scale": 6.5},
        source="showlab/Show-o, show-o2/evaluation/sample_geneval.sh",
        prompts="show-o2/prompts/geneval_meta_data_rewritten.jsonl",
    ),
    "show-o2-dpg": Preset(
        drawing={"num_steps": 50, "guidance_scale": 9.0},
        source="showlab/Show-o, show-o2/evaluation/sample_dpg.sh",
    ),
    "janus-pro": Preset(
        drawing={"guidance_scale": 4.0, "temperature": 1.0},
        source=f"deepseek-ai/Janus, generation_inference.py; {_NO_PROTOCOL} (issues 210, 212, 237)",
    ),
    "mmada": Preset(
        drawing={"num_steps": 15, "guidance_scale": 3.5},
        source=f"Gen-Verse/MMaDA, README.md, inference_t2i.py; {_NO_PROTOCOL}",
    ),
    "lumina-dimoo": Preset(
        drawing={"num_steps": 64, "guidance_scale": 4.0},
        source=f"Alpha-VLLM/Lumina-DiMOO, README.md, text to image; {_NO_PROTOCOL}",
    ),
    "bagel": Preset(
        drawing={"num_steps": 50, "guidance_scale": 3.0},
        source=f"ByteDance-Seed/Bagel, inference.ipynb; {_NO_PROTOCOL}",
    ),
}


def with_preset(config: Config, name: str) -> Config:
    """A config whose evaluation draws as a preset says.

    Raises: InputError if there is none of that name, or the config says otherwise.
    """
    preset = PRESETS.get(name)
    if preset is None:
        raise InputError(f"--preset {name}: there is none; there are {', '.join(PRESETS)}")
    given = config.drawn_by(config.eval).drawing()
    for key, value in preset.drawing.items():
        if given.get(key, value) != value:
            raise InputError(f"--preset {name}: has {key} {value:g}, you gave {given[key]:g}; leave one of them out")
    return replace(config, eval=replace(config.eval, **preset.drawing))
