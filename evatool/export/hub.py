"""Upload of a verified export to the Hugging Face hub."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from evatool.core.bounded_json import read_json
from evatool.core.errors import DependencyError, EvatoolError, UsageError
from evatool.export.folder import Exported
from evatool.weights.source import OPEN_CLIP_CONFIG


def check_credentials(repository: str) -> None:
    """Before anything is computed. Raises: UsageError without a login or with an unusable name."""
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise UsageError(
            f"{repository!r} is no repository on the Hugging Face hub",
            where="export.push_to_hub",
            expected="owner/name",
        )
    try:
        from huggingface_hub import get_token
    except ImportError as error:
        raise DependencyError("uploading needs huggingface_hub", fix="pip install huggingface_hub") from error
    if get_token() is None:
        raise UsageError(
            "there are no credentials for the Hugging Face hub on this machine",
            where="export.push_to_hub",
            fix="run `hf auth login`, or set HF_TOKEN, and repeat the command",
        )


def push_to_hub(exported: Exported, repository: str) -> str:
    """Upload the files of an export, creating the repository if need be; returns its address.

    A folder that is tied to its path is tied to the repository instead: timm reads its arguments there.
    Raises: EvatoolError with the hub's words if it refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi()
    try:
        address = str(api.create_repo(repository, exist_ok=True))
        for name in exported.files:
            path = exported.folder / name
            if name == OPEN_CLIP_CONFIG:
                with tempfile.TemporaryDirectory(prefix="evatool-hub-") as scratch:
                    changed = _for_the_hub(path, repository, Path(scratch))
                    api.upload_file(path_or_fileobj=changed, path_in_repo=name, repo_id=repository)
            else:
                api.upload_file(path_or_fileobj=path, path_in_repo=name, repo_id=repository)
    except (HfHubHTTPError, OSError) as error:
        raise EvatoolError(
            f"the Hugging Face hub refused the upload: {str(error).splitlines()[0]}",
            where=repository,
            fix=f"the export itself is whole in {exported.folder}; upload it with `hf upload {repository} "
            f"{exported.folder}`",
        ) from error
    return address


def _for_the_hub(config: Path, repository: str, scratch: Path) -> Path:
    table = read_json(config)
    vision = table["model_cfg"]["vision_cfg"]
    if str(vision.get("timm_model_name", "")).startswith("local-dir:"):
        vision["timm_model_name"] = f"hf-hub:{repository}"
    changed = scratch / config.name
    changed.write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")
    return changed
