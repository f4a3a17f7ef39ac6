"""What an ONNX export needs to be served alone: preprocessing, tokenizer, scores, and a script that uses them."""

from __future__ import annotations

import importlib.metadata
import json
import zipfile
from pathlib import Path
from typing import Any

from evatool.core.errors import EvatoolError
from evatool.export.folder import write_json, write_text
from evatool.inference.loaded_clip import LoadedClip
from evatool.inference.onnx_package import PREPROCESSOR, SCORES, has_clip_tokenizer

TOKENIZER, SCRIPT, FTFY = "tokenizer.json", "classify.py", "ftfy.zip"

ODD_CAPTIONS = (
    "A Photo of a CAT",
    "  spaces\tand\nlines  ",
    "caf&eacute; &amp; &lt;b&gt;bar&lt;/b&gt;",
    "&amp;amp;lt; twice",
    "e&#769; unescaped late < sign",
    "schÃ¶ne GrÃ¼ÃŸe â€“ â€œquotedâ€\x9d",
    "“curly” ‘quotes’ it’s we'll",
    "ﬁne ligatures ﬂow and ＦＵＬＬ ｗｉｄｔｈ",
    "smile 😀 family 👨‍👩‍👧‍👦 flag 🇩🇪 hand 👍🏽",
    "日本語の猫 и русская кошка قطة",
    "e\u0301 composed, İstanbul, ΣΊΣΥΦΟΣ, straße",
    "numbers 12345 3.14 ½ ²",
    "null\x00 and \x1b[31mcontrol\x07",
    "zero\u200bwidth non\u00a0breaking soft\u00adhyphen",
    "<start_of_text> in the middle <END_OF_TEXT>",
    "!!!??... --- ###",
    "",
    "word " * 200,
)
"""Captions on which tokenizers differ: every export compares its own on them."""


def package_files(clip: LoadedClip) -> tuple[str, ...]:
    """The files beside the graphs of both towers; the script needs a tokenizer that it can read."""
    always = (PREPROCESSOR, SCORES)
    return (*always, TOKENIZER, SCRIPT, FTFY) if has_clip_tokenizer(clip.tokenizer) else always


def write_package(folder: Path, clip: LoadedClip) -> None:
    """Write `package_files` beside graphs that are there.

    Raises: EvatoolError where the written tokenizer gives other ids than the model's.
    """
    write_json(folder / PREPROCESSOR, preprocessor(clip))
    write_json(folder / SCORES, scores(clip))
    if has_clip_tokenizer(clip.tokenizer):
        write_json(folder / TOKENIZER, tokenizer_table())
        write_text(folder / SCRIPT, Path(__file__).with_name("onnx_classify.py").read_text(encoding="utf-8"))
        _write_ftfy(folder / FTFY)
        refuse_other_ids(folder, clip)


def preprocessor(clip: LoadedClip) -> dict[str, Any]:
    """How a picture becomes an input: resize, crop, statistics."""
    wanted = clip.config.input
    return {
        "size": list(clip.input_size),
        "resize": wanted.resize,
        "interpolation": wanted.interpolation,
        "fill": wanted.fill,
        "mean": list(wanted.mean),
        "std": list(wanted.std),
        "colors": "RGB, values divided by 255",
        "axes": ["batch", "channels", "height", "width"],
    }


def scores(clip: LoadedClip) -> dict[str, Any]:
    """How features become scores: temperature (exponentiated) and bias, and what texts are cut and padded to."""
    table: dict[str, Any] = {
        "name": clip.config.name,
        "embed_dim": clip.embed_dim,
        "context_length": clip.context_length,
        "vocab_size": getattr(clip.model.text, "vocab_size", None),
        "logit_scale": clip.logit_scale,
        "logit_bias": clip.logit_bias,
        "probability": "softmax over the texts" if clip.logit_bias is None else "sigmoid of each pair",
    }
    if has_clip_tokenizer(clip.tokenizer):
        table |= {"start_token": "<start_of_text>", "end_token": "<end_of_text>", "padding": 0}
    return table


def tokenizer_table(start: str = "<start_of_text>", end: str = "<end_of_text>") -> dict[str, Any]:
    """CLIP's byte pairs as the `tokenizers` library reads them; `start` and `end` name its two special tokens.

    Texts must have been cleaned before, as `classify.py` does: no part of the library repairs text. White space and
    capitals are treated here as well, for readers that clean nothing.
    """
    from open_clip.tokenizer import SimpleTokenizer

    reference = SimpleTokenizer()
    special = (start, end)
    own = dict(zip(("<start_of_text>", "<end_of_text>"), special, strict=True))
    vocabulary = {own.get(token, token): number for token, number in reference.encoder.items()}
    added = [
        {"id": vocabulary[token], "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for token in special
    ]
    pieces = r"(?i)'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    lower = [{"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}, {"type": "Lowercase"}]
    split = {"type": "Split", "pattern": {"Regex": pieces}, "behavior": "Removed", "invert": True}
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": lower},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, bytes_]},
        "post_processor": {
            "type": "RobertaProcessing",
            "sep": [end, vocabulary[end]],
            "cls": [start, vocabulary[start]],
            "trim_offsets": False,
            "add_prefix_space": False,
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": end,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(pair) for pair in reference.bpe_ranks],
        },
    }


def refuse_other_ids(folder: Path, clip: LoadedClip) -> None:
    """Raises: EvatoolError unless `classify.py` in `folder` gives the model's own ids for `ODD_CAPTIONS`."""
    import runpy

    script = runpy.run_path(str(folder / SCRIPT))
    package = script["Package"](folder)
    theirs, ours = package.tokens(list(ODD_CAPTIONS)), clip.tokenizer(list(ODD_CAPTIONS)).numpy()
    differing = [text for text, one, other in zip(ODD_CAPTIONS, theirs, ours, strict=True) if (one != other).any()]
    if differing:
        raise EvatoolError(
            f"the exported tokenizer gives other ids for {json.dumps(differing[0][:80])}",
            where=str(folder),
            expected="the ids that the model was trained on",
            fix="nothing was written; another version of tokenizers may agree: pip install -U tokenizers",
        )


def _write_ftfy(path: Path) -> None:
    """The installed ftfy with its licence, as Python imports it from a zip archive; the same bytes every time."""
    distribution = importlib.metadata.distribution("ftfy")
    wanted = [
        file
        for file in distribution.files or []
        if (file.suffix == ".py" and file.parts[0] == "ftfy" and file.name != "cli.py") or "LICENSE" in file.name
    ]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(wanted, key=str):
            name = str(file) if file.parts[0] == "ftfy" else f"ftfy/{file.name}"
            archive.writestr(zipfile.ZipInfo(name), Path(str(file.locate())).read_bytes(), zipfile.ZIP_DEFLATED)
