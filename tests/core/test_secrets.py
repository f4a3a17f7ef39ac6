"""Credentials in command lines, recipes and messages."""

from __future__ import annotations

import pytest

from evatool.core.secrets import holds_secrets, mask_arguments, mask_secrets, mask_values


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:hunter2@host/a.tar", "https://***@host/a.tar"),
        ("s3://ghp_token@host/a.tar", "s3://***@host/a.tar"),
        (
            "https://h/{0..9}.tar?X-Amz-Signature=abc&sv=2020#access_token=q",
            "https://h/{0..9}.tar?X-Amz-Signature=***&sv=***#access_token=***",
        ),
        ("https://h/a.tar?abcdef", "https://h/a.tar?***"),
        ('token = "abc def"', 'token = "***"'),
        ("export.hub_token='abc'", "export.hub_token='***'"),
        ('headers = { Authorization = "Bearer abc", "X-Api-Key" = "k" }', None),
        ('{"password": "abc \\" def"}', '{"password": "***"}'),
        ("data.remote.secret=abc", "data.remote.secret=***"),
        ("Authorization: Bearer eyJhbGciOi.J9", "Authorization: Bearer ***"),
        ("pushed with hf_abcdefghijklmnopqrstuvwxyz", "pushed with ***"),
    ],
)
def test_credentials_are_hidden(text: str, expected: str | None) -> None:
    masked = mask_secrets(text)
    assert holds_secrets(text)
    assert not holds_secrets(masked)
    if expected is not None:
        assert masked == expected
    for secret in ("hunter2", "ghp_token", "abc", '"k"', "eyJ", "def"):
        assert secret not in masked


@pytest.mark.parametrize(
    "text",
    [
        "step 5/10  loss 0.5  num_tokens=77",
        "https://host:8000/{000..123}.tar and s3://bucket/a/b.tar",
        "file:///data/a?.tar",
        "pos_embed, mask_token, cls_token: not in the file",
        'token = ""',
        "user@example.org wrote: the token: it is long",
        "model.text.pad_token = 0",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert mask_secrets(text) == text


def test_a_command_line_is_kept_without_its_credentials() -> None:
    command = ["evatool", "train-clip", "r.toml", "--set", "data.train=https://u:p1@h/a.tar?sig=p2", "--resume"]
    command += ["--set=data.remote.password=p3 with spaces", "--set", "x.token=p4 p4", "--token", "p5", "--json"]
    masked = mask_arguments(command)
    assert not any(f"p{i}" in " ".join(masked) for i in range(1, 6))
    assert masked[:4] == command[:4]
    assert (masked[5], masked[-1]) == ("--resume", "--json")
    assert masked[4] == "data.train=https://***@h/a.tar?sig=***"


def test_values_of_tables_are_hidden_by_their_names() -> None:
    table = {"data": {"token": "abc", "headers": {"cookie": ["x"]}, "num": 3, "shards": ["https://a:b@h/0.tar"]}}
    assert mask_values(table) == {
        "data": {"token": "***", "headers": {"cookie": ["***"]}, "num": 3, "shards": ["https://***@h/0.tar"]}
    }


def test_long_texts_take_no_time() -> None:
    for text in ("token" * 8_000, "a." * 20_000, "https://" + "a" * 40_000, "=" * 40_000):
        assert not holds_secrets(text)
