"""The README.md of an export: what it shows of names and recipes from outside."""

from __future__ import annotations

from pathlib import Path

from evatool.export.model_card import CardFacts, model_card, published_recipe


def card(facts: CardFacts) -> str:
    return model_card(facts, library="open_clip", loading="load()", notes=[], verification="Compared.")


def test_names_are_text_on_the_card() -> None:
    name = "[x](http://h)|`<b>\x1b\n# forged"
    recipe = 'stage = "train-clip"\n```\n# forged\n\x1b'
    text = card(CardFacts(name, name, [(name, name)], {"image": 1}, recipe, [(name, "5 %")], "0.1"))
    assert text.replace("\n", "").isprintable()
    assert "](" not in text.replace("``[x](http://h)", "")  # within code it is no link
    assert text.count("````") == 2
    outside = text.split("````")[0] + text.split("````")[2]
    assert "# forged" not in outside.split("\n")
    assert "<b>" not in outside.replace("`<b>\\x1b\\n# forged``", "")


def test_a_published_recipe_has_no_credentials(tmp_path: Path) -> None:
    (tmp_path / "resolved.toml").write_text('shards = "https://me:pw1@host/0.tar?sig=pw2"\ntoken = "pw3"\n')
    recipe = published_recipe(tmp_path)
    assert recipe == 'shards = "https://***@host/0.tar?sig=***"\ntoken = "***"\n'
    assert published_recipe(tmp_path / "elsewhere") is None
