"""Peak memory of converting and loading a checkpoint of 4.5 GB: at most its largest tensor and 1 GB beyond the model.

    python tests/benchmarks/conversion.py [PRESET] [FOLDER]
    python tests/benchmarks/conversion.py --shards EVA-CLIP-18B FOLDER

A synthetic file in EVA-CLIP's names (EVA01-CLIP-g-14, float32 by default) is converted to every format that is written
tensor by tensor, converted back, and loaded. Each step runs in a process of its own; its peak is `ru_maxrss`, which
counts the interpreter and its libraries too. Needs three times the file's size on the disk.

With `--shards`, a model larger than the memory: bfloat16 shards with an index, as the hub has them, become one file.
The shards are zeros in sparse files, so that only the result takes room (36.7 GB for EVA-CLIP-18B).
"""

from __future__ import annotations

import json
import math
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GB = 1e9


def make(preset: str, path: Path) -> None:
    """Write the synthetic checkpoint, one tensor at a time."""
    import torch

    from evatool.export.baai import baai_state
    from evatool.formats.safetensors import TensorMap
    from evatool.formats.torch_zip import write_torch_archive
    from evatool.model.clip import build_clip
    from evatool.model.presets import resolve_preset

    config = resolve_preset(preset)
    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_clip(config).state_dict().items()}

    class Synthetic(TensorMap):
        def __getitem__(self, name: str) -> torch.Tensor:
            if name == "logit_scale":
                return torch.tensor(4.6052)
            return 0.02 * torch.randn(shapes[name], generator=torch.Generator().manual_seed(len(name)))

        def __iter__(self):
            return iter(shapes)

        def __len__(self) -> int:
            return len(shapes)

        def shape(self, name: str) -> tuple[int, ...]:
            return () if name == "logit_scale" else shapes[name]

        def dtype(self, name: str) -> torch.dtype:
            return torch.float32

    write_torch_archive(path, baai_state(Synthetic(), config))


def make_shards(preset: str, folder: Path) -> None:
    """Write safetensors shards of at most 5 GB and their index; every weight is 0 and takes no room on the disk."""
    import torch

    from evatool.model.clip import build_clip
    from evatool.model.presets import resolve_preset

    with torch.device("meta"):
        shapes = {name: tuple(t.shape) for name, t in build_clip(resolve_preset(preset)).state_dict().items()}
    shards: list[dict[str, dict[str, object]]] = [{}]
    used = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if used + size > 5 * GB:
            shards.append({})
            used = 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [used, used + size]}
        used += size
    folder.mkdir(parents=True)
    owners = {}
    for number, header in enumerate(shards, 1):
        path = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(file.tell() + max(entry["data_offsets"][1] for entry in header.values()))
        owners |= dict.fromkeys(header, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": owners}))


def sizes(path: Path) -> tuple[float, float]:
    """Bytes of all tensors and of the largest."""
    from evatool.formats.safetensors import dtype_of, shape_of
    from evatool.weights.open import open_weights

    state = open_weights(path)
    each = []
    for name in state:
        count = 1
        for side in shape_of(state, name):
            count *= side
        each.append(count * dtype_of(state, name).itemsize)
    return sum(each), max(each)


def convert(source: Path, out: Path, form: str) -> None:
    from evatool.recipe.schema import ExportRecipe
    from evatool.runs.run_dir import RunOptions
    from evatool.stages.export import run

    export = {"checkpoint": str(source), "format": form, "streamed": True}
    recipe = ExportRecipe.model_validate({"stage": "export", "export": export}, strict=True)
    run(recipe, RunOptions(name="benchmark", run_dir=out))


def load(source: Path) -> None:
    import evatool

    evatool.load_clip(source)


def measured(*arguments: str) -> tuple[float, float]:
    """Peak memory in bytes and seconds of one step in a process of its own."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--step", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return float(done.stdout.split()[-1]) * 1024, time.perf_counter() - start


def main(preset: str, folder: Path) -> None:
    source = folder / "source.pt"
    measured("make", preset, str(source))
    total, largest = sizes(source)
    print(f"{preset}: {total / GB:.2f} GB in tensors, the largest {largest / GB:.2f} GB")
    idle, _ = measured("idle")
    print(f"imports alone: {idle / GB:.2f} GB")
    steps = {
        "baai -> open_clip": (0.0, ("convert", str(source), str(folder / "a"), "open_clip")),
        "open_clip -> baai": (0.0, ("convert", str(folder / "a"), str(folder / "b"), "baai")),
        "baai -> safetensors": (0.0, ("convert", str(folder / "b"), str(folder / "c"), "safetensors")),
        "load_clip(safetensors)": (total, ("load", str(folder / "c"))),
        "load_clip(baai)": (total, ("load", str(source))),
    }
    for name, (model, arguments) in steps.items():
        if name == "baai -> safetensors":
            shutil.rmtree(folder / "a")
        peak, seconds = measured(*arguments)
        beyond = peak - model - largest
        verdict = "within" if beyond <= GB else "BEYOND"
        print(
            f"{name:24} peak {peak / GB:6.2f} GB; beyond the model and the largest tensor {beyond / GB:5.2f} GB "
            f"({verdict} 1 GB), {seconds:.0f} s"
        )


def main_shards(preset: str, folder: Path) -> None:
    measured("make-shards", preset, str(folder / "shards"))
    total, largest = sizes(folder / "shards")
    print(f"{preset}: {total / GB:.2f} GB in tensors, the largest {largest / GB:.2f} GB")
    peak, seconds = measured("convert", str(folder / "shards"), str(folder / "out"), "safetensors")
    print(f"shards -> safetensors    peak {peak / GB:6.2f} GB, {seconds:.0f} s")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        step, *rest = sys.argv[2:]
        match step:
            case "make":
                make(rest[0], Path(rest[1]))
            case "make-shards":
                make_shards(rest[0], Path(rest[1]))
            case "convert":
                convert(Path(rest[0]), Path(rest[1]), rest[2])
            case "load":
                load(Path(rest[0]))
            case "idle":
                import evatool.stages.export  # noqa: F401
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    elif sys.argv[1:2] == ["--shards"]:
        main_shards(sys.argv[2], Path(sys.argv[3]))
    else:
        preset = sys.argv[1] if len(sys.argv) > 1 else "EVA01-CLIP-g-14"
        if len(sys.argv) > 2:
            main(preset, Path(sys.argv[2]))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                main(preset, Path(scratch))
