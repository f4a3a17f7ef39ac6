"""Writes the API reference, one HTML page a module, from the docstrings. It needs the extra `docs` and no network.

    python docs/make_reference.py [FOLDER]        (build/docs when absent; `make docs` calls this)

The first page, `evatool`, is the public face: what other people's Python may rely on. The other pages are for those who
read or extend the package.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import warnings
from pathlib import Path

import pdoc

import evatool

ROOT = Path(__file__).resolve().parent.parent
NO_LIBRARY = ("evatool.cli", "evatool.__main__", "evatool._recipes")  # commands; `evatool --help` describes them


def modules() -> list[str]:
    """Every module of the package that can be imported as a library, the package itself first."""
    found = [module.name for module in pkgutil.walk_packages(evatool.__path__, "evatool.")]
    own = [name for name in found if not any(name == left or name.startswith(f"{left}.") for left in NO_LIBRARY)]
    return ["evatool", *(name for name in own if not any(part.startswith("_") for part in name.split(".")[1:]))]


def write(folder: Path, names: list[str]) -> None:
    """Write a page for each module and an index into `folder`; a name that cannot be documented is an error."""
    # The package fetches its public names on first use, and pdoc looks into its dictionary.
    for name in evatool.__all__:
        evatool.__dict__.setdefault(name, getattr(evatool, name))
    for name in names:
        importlib.import_module(name)  # a module that does not import stops here, with its own error
    pdoc.render.configure(docformat="google", show_source=False, footer_text=f"evatool {evatool.__version__}")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Found .* does not resolve")
        # A package brings its modules along, so most are named twice. A package with `__all__` does not: name all.
        warnings.filterwarnings("ignore", message="The module specification")
        # Types that are imported for type checkers only are shown as they are written.
        warnings.filterwarnings("ignore", message="Error parsing type annotation")
        pdoc.pdoc(*names, output_directory=folder)


def main() -> None:
    """Write the pages and say where they are."""
    parser = argparse.ArgumentParser(description="the API reference from the docstrings")
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "build" / "docs")
    folder: Path = parser.parse_args().folder
    names = modules()
    write(folder, names)
    print(f"{len(names)} modules: {folder / 'index.html'}")


if __name__ == "__main__":
    main()
