"""Recipes: typed sections, reading and writing TOML. No torch."""
