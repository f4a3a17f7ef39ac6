"""A folder that transformers opens: its own `CLIPModel`, or BAAI's `EvaCLIPModel` for towers like 8B's and 18B's."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from evatool.core.errors import CheckpointError, DependencyError, RecipeError
from evatool.export.base import Exporter
from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.onnx_package import tokenizer_table
from evatool.export.verify import (
    TRANSFORMERS_READER,
    fixed_inputs,
    foreign_outputs,
    largest_difference,
    our_outputs,
    refuse_different_tensors,
)
from evatool.export.written import written_tensors
from evatool.formats.safetensors import SafetensorsMap, write_safetensors
from evatool.inference.loaded_clip import LoadedClip
from evatool.inference.onnx_package import has_clip_tokenizer
from evatool.model.config import ModelConfig
from evatool.model.vision import has_head_bias
from evatool.weights.key_mapping import canonical_state
from evatool.weights.key_mapping_hf import EVA_CODE_SCALE, transformers_state

WEIGHTS, CONFIG, PREPROCESSOR, CARD = "model.safetensors", "config.json", "preprocessor_config.json", "README.md"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt")
_START, _END = "<|startoftext|>", "<|endoftext|>"  # transformers' names of CLIP's two tokens
_RESAMPLE = {"bilinear": 2, "bicubic": 3}

_EVA_CODE = "BAAI/EVA-CLIP-8B"
"""The repository on the hub whose code transformers runs for such a folder, with `trust_remote_code`."""


class TransformersExporter(Exporter):
    """transformers' layout."""

    format = "transformers"
    writes = (
        "`config.json`, `model.safetensors` with transformers' names, `preprocessor_config.json`, the tokenizer, a card"
    )
    verified_by = "transformers in a fresh process; BAAI's layout by reading it back, tensor by tensor"

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """Write the target folder, and open it with transformers in a process that cannot import evatool.

        BAAI's `EvaCLIPModel` is code on the hub, which is not downloaded: its files are read back by name instead.
        Raises: RecipeError for a model that transformers has no class for, DependencyError without transformers; else
        as `export_open_clip`.
        """
        refuse_other_models(clip)
        is_own = not clip.config.is_eva
        if is_own and importlib.util.find_spec("transformers") is None:
            raise DependencyError(
                "transformers verifies this export", fix="pip install 'evatool[transformers]', then the same command"
            )
        tensors = transformers_state(written_tensors(clip), is_vit=is_own)
        files = (WEIGHTS, PREPROCESSOR, *TOKENIZER_FILES, CARD, CONFIG)
        with staged_folder(target, files) as work:
            write_safetensors(work / WEIGHTS, tensors, {"format": "pt"})
            write_json(work / PREPROCESSOR, preprocessor_config(clip))
            _write_tokenizer(work, clip.context_length)
            write_json(work / CONFIG, transformers_config(clip))
            difference = _compare(clip, work, target) if is_own else _read_back(clip, work)
            write_text(work / CARD, _card(clip, facts, difference, target.tolerance))
        return Exported(target.folder, files, difference)

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through `AutoModel`."""
        trust = ", trust_remote_code=True" if config.is_eva else ""
        return f"import transformers; transformers.AutoModel.from_pretrained('{folder}'{trust})"


def refuse_other_models(clip: LoadedClip) -> None:
    """Raises: RecipeError unless transformers, or BAAI's code for it, has a class for the model."""
    config = clip.config
    problem = None
    if config.open_clip is not None:
        problem = "its architecture is open_clip's own"
    elif config.is_eva and (has_head_bias(config) or config.vision["rope"] or config.vision["qkv_bias"]):
        problem = "its image tower has parts that transformers' CLIP has not: BAAI's code for it is of 8B and 18B"
    elif config.init_logit_bias is not None:
        problem = "its CLIP has no place for a sigmoid model's logit_bias"
    elif config.is_eva and abs(clip.logit_scale / EVA_CODE_SCALE - 1) > 1e-3:
        problem = f"its code has a fixed scale of {EVA_CODE_SCALE:g}, and this model's is {clip.logit_scale:.4g}"
    elif not has_clip_tokenizer(clip.tokenizer):
        problem = "its tokenizer is another one than CLIP's"
    elif config.input.resize == "longest":
        problem = "its CLIP pads no images: resize = 'longest'"
    if problem is not None:
        raise RecipeError(
            f"transformers has no class for {config.name}: {problem}",
            where="export.format",
            expected="an OpenAI or OpenCLIP ViT trained with the softmax, or a model like EVA-CLIP-8B and 18B",
            fix="export it as open_clip; the image tower alone as timm, which transformers opens as a TimmWrapperModel",
        )


def transformers_config(clip: LoadedClip) -> dict[str, Any]:
    """`config.json`: transformers' `CLIPConfig`, or BAAI's `EvaCLIPConfig`."""
    config, text, vision = clip.config, clip.config.text, clip.config.vision
    assert text is not None
    activation = "quick_gelu" if config.quick_gelu else "gelu"
    shared = {"hidden_act": activation, "projection_dim": clip.embed_dim, "attention_dropout": 0.0}
    text_config = shared | {
        "model_type": "clip_text_model",
        "hidden_size": text["width"],
        "intermediate_size": int(text["width"] * text["mlp_ratio"]),
        "num_hidden_layers": text["layers"],
        "num_attention_heads": text["heads"],
        "max_position_embeddings": text["context_length"],
        "vocab_size": text["vocab_size"],
        "layer_norm_eps": 1e-5,
        "bos_token_id": text["vocab_size"] - 2,
        "eos_token_id": text["vocab_size"] - 1,
        "pad_token_id": text["vocab_size"] - 1,
    }
    vision_config = shared | {
        "model_type": "clip_vision_model",
        "hidden_size": config.width,
        "intermediate_size": int(config.width * vision["mlp_ratio"]),
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "image_size": clip.image_size,
        "patch_size": config.patch_size,
        "layer_norm_eps": 1e-6 if config.is_eva else 1e-5,
    }
    table: dict[str, Any] = {
        "architectures": ["EvaCLIPModel" if config.is_eva else "CLIPModel"],
        "model_type": "clip",
        "projection_dim": clip.embed_dim,
        "logit_scale_init_value": float(clip.model.logit_scale.float()),
        "torch_dtype": str(clip.stored_dtype).removeprefix("torch."),
    }
    if config.is_eva:
        vision_config |= {
            **dict.fromkeys(("q_bias", "k_bias", "v_bias", "use_swiglu_mlp", "use_sub_ln", "rope"), False),
            "use_rms_norm": bool(vision["use_rms_norm"]),
            "post_layernorm": bool(vision["postnorm"]),
        }
        text_config |= {"use_rms_norm": False, "post_layernorm": False, "q_bias": True, "k_bias": True, "v_bias": True}
        table["auto_map"] = {
            "AutoConfig": f"{_EVA_CODE}--configuration_evaclip.EvaCLIPConfig",
            "AutoModel": f"{_EVA_CODE}--modeling_evaclip.EvaCLIPModel",
        }
    return table | {"text_config": text_config, "vision_config": vision_config}


def preprocessor_config(clip: LoadedClip) -> dict[str, Any]:
    """`preprocessor_config.json` of transformers' `CLIPImageProcessor`."""
    wanted, (height, width) = clip.config.input, clip.input_size
    sides = {"height": height, "width": width}
    is_cropped = wanted.resize == "shortest"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": min(height, width)} if is_cropped else sides,
        "resample": _RESAMPLE[wanted.interpolation],
        "do_center_crop": is_cropped,
        "crop_size": sides,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(wanted.mean),
        "image_std": list(wanted.std),
        "do_convert_rgb": True,
    }


def _write_tokenizer(folder: Path, context_length: int) -> None:
    table = tokenizer_table(_START, _END)
    write_json(folder / "tokenizer.json", table)
    write_json(folder / "vocab.json", table["model"]["vocab"])
    merges = "\n".join(" ".join(pair) for pair in table["model"]["merges"])
    write_text(folder / "merges.txt", f"#version: 0.2\n{merges}\n")
    names = {"bos_token": _START, "eos_token": _END, "unk_token": _END, "pad_token": _END}
    described = {"tokenizer_class": "CLIPTokenizer", "model_max_length": context_length, "do_lower_case": True}
    write_json(folder / "tokenizer_config.json", described | names)


_CAPTIONS = ("a photo of a cat", "Two DOGS, running!", "it's 12 o'clock")


def _compare(clip: LoadedClip, folder: Path, target: Target) -> float:
    """The largest difference to what transformers computes; its token ids must be ours."""
    assert clip.config.text is not None
    inputs = fixed_inputs(clip.image_size, clip.context_length, clip.config.text["vocab_size"])
    theirs = foreign_outputs(TRANSFORMERS_READER.replace("CAPTIONS", repr(list(_CAPTIONS))), folder, inputs)
    ids, ours = theirs["ids"], clip.tokenizer(list(_CAPTIONS))
    used = ours != 0
    if not torch.equal(ids[:, : ours.shape[1]][used], ours[used]):
        raise CheckpointError("transformers' tokenizer gives other ids", where=str(folder), fix="please report it")
    outputs = our_outputs(clip, inputs)
    outputs.pop("preprocessed")  # transformers resizes by another library, whose pixels differ by grey levels
    return largest_difference(theirs, outputs, target)


def _read_back(clip: LoadedClip, folder: Path) -> float:
    """0: every tensor of BAAI's layout comes back with the same bits under our names."""
    found = canonical_state(SafetensorsMap(folder / WEIGHTS), str(folder))
    ours = {name: tensor for name, tensor in written_tensors(clip).items() if name != "logit_scale"}
    refuse_different_tensors({name: found[name] for name in found if name != "logit_scale"}, ours, folder)
    return 0.0


def _card(clip: LoadedClip, facts: CardFacts, difference: float, allowed: float) -> str:
    trust = ", trust_remote_code=True" if clip.config.is_eva else ""
    loading = (
        "from transformers import AutoModel, AutoProcessor\n"
        f'model = AutoModel.from_pretrained("PATH/OF/THIS/FOLDER"{trust}).eval()\n'
        'processor = AutoProcessor.from_pretrained("PATH/OF/THIS/FOLDER")'
    )
    if clip.config.is_eva:
        notes = [
            f"The layout is that of BAAI's `EvaCLIPModel`, whose code lies in {_EVA_CODE} on the hub; it holds no "
            f"temperature, which stands in that code as {EVA_CODE_SCALE:g}."
        ]
        verified = "Before it was published, every tensor was read back under its first name with the same bits."
    else:
        notes = ["transformers' image processor resizes by another library: its pixels differ by grey levels."]
        verified = (
            "Before it was published, transformers opened this folder in a fresh process that cannot import evatool. "
            f"Features and temperature differ by at most {difference:.1e} (relative L2 per tensor; {allowed:.0e} was "
            "allowed), and token ids are the same."
        )
    return model_card(facts, library="transformers", loading=loading, notes=notes, verification=verified)
