"""Check which inference servers would refuse a LoRA directory, and why.

The rules of each server, with the source files in which they are implemented (November 2026):

- vLLM (https://github.com/vllm-project/vllm): `vllm/lora/peft_helper.py` refuses DoRA, `modules_to_save`, trained
  biases, and ranks above `max_lora_rank`. In `vllm/config/lora.py`, `max_lora_rank` is 16 by default and must be one of
  `VLLM_RANKS`. `vllm/lora/utils.py` refuses tensors other than `lora_A` and `lora_B`.
- SGLang (https://github.com/sgl-project/sglang): `python/sglang/srt/lora/lora_manager.py` refuses DoRA, and `lora.py`
  supports only the tensors `lora_A` and `lora_B`. SGLang allocates memory for the adapters that are passed at startup.
  To load other adapters later, set a sufficient `--max-lora-rank` and all required `--lora-target-modules`.
- llama.cpp (https://github.com/ggml-org/llama.cpp): `convert_lora_to_gguf.py` and `src/llama-adapter.cpp` refuse
  tensors other than `lora_A` and `lora_B`, including DoRA's magnitudes.
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .config import CONFIG, WEIGHTS
from .files import map_safetensors, parse_json


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
VLLM_DEFAULT_RANK = 16
_FACTORS = (".lora_A.weight", ".lora_B.weight")


class Refusal(NamedTuple):
    """A reason why a server refuses a LoRA, and a remedy.

    Attributes:
        server: "vLLM", "SGLang" or "llama.cpp".
        reason: The property of the LoRA that the server does not support.
        repair: What to do so that the server can run the adapter.
    """

    server: str
    reason: str
    repair: str


def check_lora(path: str | os.PathLike[str]) -> list[Refusal]:
    """Return the reasons why servers would refuse a PEFT LoRA directory. The list may be empty.

    Args:
        path: A directory as written by `export_lora` or PEFT.

    Raises:
        OSError: If the directory lacks a file.
        ValueError: If a file is damaged.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from vera_func import VeraConfig, adapt, export_lora
        >>> model = nn.Sequential(nn.Linear(8, 6))
        >>> adapted = adapt(model, VeraConfig(r=4, target_modules=["0"]))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     check_lora(export_lora(folder, *adapted[1:], model).path)
        []
    """
    config_file, weights_file = Path(path) / CONFIG, Path(path) / WEIGHTS
    fields = parse_json(config_file, config_file.read_text(encoding="utf-8"))
    if not isinstance(fields, dict) or not isinstance(fields.get("r"), int):
        raise ValueError(f"{config_file} is not the configuration of a LoRA: it has no integer r.")
    return refusals(fields, map_safetensors(weights_file)[1].keys())


def refusals(fields: Mapping[str, Any], names: Collection[str]) -> list[Refusal]:
    """Return the reasons why servers would refuse a LoRA, given its configuration and tensor names.

    Args:
        fields: The content of the LoRA's `adapter_config.json`.
        names: Names of the LoRA's tensors.

    Example:
        >>> for refusal in refusals({"r": 200, "use_dora": True}, []):
        ...     print(*refusal, sep=" | ")
        vLLM | rank 200 is above its default maximum of 16 | start it with --max-lora-rank 256
        vLLM | DoRA | merge the adapter
        SGLang | DoRA | merge the adapter
        llama.cpp | DoRA | merge the adapter
    """
    found: list[Refusal] = []
    rank = fields["r"]
    if rank > VLLM_RANKS[-1]:
        repair = f"export it with rank={VLLM_RANKS[-1]}, which truncates it, or merge it"
        found.append(Refusal("vLLM", f"rank {rank} is above its maximum of {VLLM_RANKS[-1]}", repair))
    elif rank > VLLM_DEFAULT_RANK:
        enough = next(each for each in VLLM_RANKS if each >= rank)
        reason = f"rank {rank} is above its default maximum of {VLLM_DEFAULT_RANK}"
        found.append(Refusal("vLLM", reason, f"start it with --max-lora-rank {enough}"))
    own = [name for name in sorted(names) if not name.endswith(_FACTORS) and "lora_magnitude_vector" not in name]
    reasons = []
    if own or fields.get("modules_to_save") or fields.get("bias", "none") != "none":
        what = f" ({own[0].removeprefix('base_model.model.')})" if own else ""
        reasons.append(f"a trained head or bias{what}")
    if fields.get("use_dora"):
        reasons.append("DoRA")
    servers = ("vLLM", "SGLang", "llama.cpp")
    return found + [Refusal(server, reason, "merge the adapter") for reason in reasons for server in servers]


def warning_text(found: Collection[Refusal]) -> str | None:
    """Return the text of a warning about the refusals, or None if there are none.

    Example:
        >>> warning_text(refusals({"r": 8, "use_dora": True}, []))
        'a server may refuse this LoRA. vLLM, SGLang, llama.cpp: DoRA (merge the adapter).'
    """
    by_reason: dict[tuple[str, str], list[str]] = {}
    for server, reason, repair in found:
        by_reason.setdefault((reason, repair), []).append(server)
    parts = [f"{', '.join(servers)}: {reason} ({repair})." for (reason, repair), servers in by_reason.items()]
    return f"a server may refuse this LoRA. {' '.join(parts)}" if parts else None
