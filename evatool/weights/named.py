"""Sources that are names and not paths: `open_clip:NAME/TAG`, `hf-hub:OWNER/NAME`, `local-dir:PATH`."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip

from evatool.core.errors import DependencyError, UsageError
from evatool.core.own_folder import expand_user
from evatool.model.config import ModelConfig, open_clip_config
from evatool.weights.description import open_clip_input

OPEN_CLIP, HF_HUB, LOCAL_DIR = "open_clip:", "hf-hub:", "local-dir:"
_HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.pt", "*.model", "*.txt"]


@dataclass(frozen=True)
class NamedSource:
    """Where a source's weights are, and what its name says of the model.

    Attributes:
        weights: file or folder; None for random weights.
        config: the architecture and input that the name stands for; None where the weights say it.
        label: in reports.
    """

    weights: Path | None
    config: ModelConfig | None
    label: str


def named_source(source: str | Path) -> NamedSource | None:
    """What `source` names; None where it is a path or a preset.

    Raises: UsageError for a name that open_clip does not know; DependencyError where weights cannot be downloaded.
    """
    text = str(source)
    if text.startswith(LOCAL_DIR):
        return NamedSource(expand_user(text.removeprefix(LOCAL_DIR)), None, text)
    if text.startswith(HF_HUB):
        return NamedSource(_downloaded(text.removeprefix(HF_HUB)), None, text)
    if text.startswith(OPEN_CLIP):
        return _tagged(text)
    return None


def _tagged(source: str) -> NamedSource:
    name, _, tag = source.removeprefix(OPEN_CLIP).partition("/")
    table = open_clip.get_model_config(name)
    if table is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise UsageError(
            f"open_clip has no model {name!r}",
            where=source,
            expected="a name of open_clip.list_models(), and after a slash one of its pretrained tags",
            fix=f"did you mean {' or '.join(near)}?" if near else None,
        )
    if not tag:
        config = open_clip_config(table, name)
        return NamedSource(None, config, f"open_clip {name}, random weights")
    facts = open_clip.get_pretrained_cfg(name, tag)
    if not facts:
        known = open_clip.list_pretrained_tags_by_model(name)
        raise UsageError(
            f"open_clip has no weights {tag!r} of {name}", where=source, expected=f"one of {', '.join(known) or 'none'}"
        )
    config = tagged_config(name, tag)
    try:
        path = Path(open_clip.download_pretrained(facts))
    except Exception as error:  # huggingface_hub and urllib raise what they like
        raise DependencyError(
            f"the weights of {source} cannot be downloaded: {(str(error).splitlines() or [''])[0][:300]}",
            where=source,
            expected="the network, or the file in open_clip's cache",
            fix="download the file elsewhere, put open_clip_config.json beside it, and name the folder",
        ) from error
    return NamedSource(path, config, f"open_clip {name}, {tag}")


def tagged_config(name: str, tag: str) -> ModelConfig:
    """The model of a tag in open_clip's tables: its architecture, and the activation and input it was trained with.

    Raises: CheckpointError for an input that evatool cannot make.
    """
    table, facts = open_clip.get_model_config(name), open_clip.get_pretrained_cfg(name, tag)
    assert table is not None, name
    if "quick_gelu" in facts:  # open_clip itself only warns where the name says otherwise
        table["quick_gelu"] = bool(facts["quick_gelu"])
    wanted, _ = open_clip_input({key: value for key, value in facts.items() if key != "size"}, Path(f"{name}/{tag}"))
    return replace(open_clip_config(table, name, wanted), input=wanted)


def _downloaded(repo: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise DependencyError(
            f"{HF_HUB}{repo} cannot be downloaded: {(str(error).splitlines() or [''])[0][:300]}",
            where=f"{HF_HUB}{repo}",
            expected="OWNER/NAME of a repository on the Hugging Face hub, and the network",
            fix="download the repository elsewhere and name its folder",
        ) from error
