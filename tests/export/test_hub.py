"""Uploads; the network itself is a stand-in."""

import json

import huggingface_hub
import pytest

from evatool.core.errors import EvatoolError, UsageError
from evatool.export.folder import Exported
from evatool.export.hub import check_credentials, push_to_hub


@pytest.fixture
def exported(tmp_path):
    config = {"model_cfg": {"vision_cfg": {"timm_model_name": "local-dir:/where/it/was/made"}}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    (tmp_path / "README.md").write_text("card")
    return Exported(tmp_path, ("README.md", "open_clip_config.json"), 0.0)


@pytest.fixture
def hub(monkeypatch):
    files = {}

    class Hub:
        def create_repo(self, repository, exist_ok):
            return f"https://huggingface.co/{repository}"

        def upload_file(self, *, path_or_fileobj, path_in_repo, repo_id):
            if repo_id == "someone/else":
                raise OSError("403 Forbidden\nlong trace")
            files[path_in_repo] = path_or_fileobj.read_text()

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    return files


def test_every_file_goes_up_and_a_tied_folder_is_tied_to_the_repository(exported, hub):
    assert push_to_hub(exported, "me/model") == "https://huggingface.co/me/model"
    assert set(hub) == set(exported.files)
    assert json.loads(hub["open_clip_config.json"])["model_cfg"]["vision_cfg"]["timm_model_name"] == "hf-hub:me/model"
    assert "local-dir:" in (exported.folder / "open_clip_config.json").read_text()  # the local copy stays


def test_a_refusal_says_where_the_export_is(exported, hub):
    with pytest.raises(EvatoolError, match="403 Forbidden") as caught:
        push_to_hub(exported, "someone/else")
    assert str(exported.folder) in caught.value.fix


def test_no_credentials(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UsageError, match="no credentials"):
        check_credentials("me/model")


@pytest.mark.parametrize("name", ["model", "a/b/c", "/x"])
def test_a_name_that_is_no_repository(name):
    with pytest.raises(UsageError, match="no repository"):
        check_credentials(name)
