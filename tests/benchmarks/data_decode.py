"""CPU time from tar to (uint8 picture, token ids) against open_clip's reader, per picture size, on one core.

`python tests/benchmarks/data_decode.py [--rounds N] [--json FILE]`, on an idle machine. Shards of JPEGs (4:2:0, quality
75 to 90) cut from the two photographs that scikit-learn ships, enlarged where a size asks for more pixels than they
have. Ours is the training loader as a stage builds it, without workers; the baseline is the chain of open_clip_train's
`get_wds_dataset`. Both sides take turns in one run; the least CPU time of several rounds counts.

Gates: token ids of every caption equal on both sides; PSNR of our pictures against Pillow's bicubic of the same crop;
ratios of CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from side_by_side import Worker, baseline_python, cpu_sec, finish, machine, serve, versions

SIZES = ((384, 288), (512, 384), (640, 480), (800, 600), (1024, 768))
IMAGE_SIZE, CONTEXT_LENGTH, BATCH, PICTURES = 224, 77, 64, 64
LEAST_RATIO, LEAST_MEAN_RATIO, LEAST_WORST_PSNR = 2.5, 3.0, 55.0
LEAST_SCALED_MEAN_RATIO, LEAST_SCALED_MEDIAN_PSNR = 4.0, 40.0


def make_jpegs(width: int, height: int, count: int) -> Iterator[bytes]:
    """Cuts of the photographs at one size."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(width)
    photographs = [Image.fromarray(array) for array in load_sample_images().images]
    for i in range(count):
        photograph = photographs[i % len(photographs)]
        room = min(photograph.width / width, photograph.height / height)
        share = rng.uniform(0.75, 1.0) if room <= 1 else rng.uniform(max(0.75, 1 / room), 1.0)
        cut_w, cut_h = int(width * room * share), int(height * room * share)
        left = int(rng.integers(photograph.width - cut_w + 1))
        top = int(rng.integers(photograph.height - cut_h + 1))
        image = photograph.crop((left, top, left + cut_w, top + cut_h))
        out = io.BytesIO()
        image.resize((width, height), Image.Resampling.LANCZOS).save(
            out, "JPEG", quality=int(rng.integers(75, 91)), subsampling="4:2:0"
        )
        yield out.getvalue()


def write_shards(folder: Path) -> dict[str, float]:
    """One tar a size; returns the mean bits a pixel."""
    import webdataset

    from evatool.data.prepare.drawings import load_concepts

    captions = [f"{c.label}: {', '.join(c.tags)}" for c in load_concepts()]
    bits = {}
    for width, height in SIZES:
        name = f"{width}x{height}"
        (folder / name).mkdir()
        total = 0
        with webdataset.TarWriter(str(folder / name / "00000.tar"), encoder=False) as tar:
            for i, jpeg in enumerate(make_jpegs(width, height, PICTURES)):
                tar.write({"__key__": f"{i:06d}", "jpg": jpeg, "txt": captions[i].encode()})
                total += len(jpeg)
        bits[name] = 8 * total / (PICTURES * width * height)
    return bits


# The baseline's side -------------------------------------------------------------------------------------------------


def open_clip_batches(shard: str) -> Iterator[Any]:
    """open_clip_train's chain of steps for a training shard, without its buffers for shuffling."""
    import webdataset
    from open_clip.tokenizer import SimpleTokenizer
    from open_clip.transform import image_transform
    from open_clip_train.data import filter_no_caption_or_no_image, log_and_continue, tarfile_to_samples_nothrow

    preprocess = STATE.setdefault("preprocess", image_transform(IMAGE_SIZE, is_train=True))
    tokenizer = STATE.setdefault("tokenizer", SimpleTokenizer(context_length=CONTEXT_LENGTH))
    return iter(
        webdataset.DataPipeline(
            webdataset.SimpleShardList([shard]),
            tarfile_to_samples_nothrow,
            webdataset.select(filter_no_caption_or_no_image),
            webdataset.decode("pilrgb", handler=log_and_continue),
            webdataset.rename(image="jpg;png;jpeg;webp", text="txt"),
            webdataset.map_dict(image=preprocess, text=lambda text: tokenizer(text)[0]),
            webdataset.to_tuple("image", "text"),
            webdataset.batched(BATCH, partial=True),
        )
    )


STATE: dict[str, Any] = {}


def run_baseline(shard: str) -> dict[str, Any]:
    """One pass over a shard."""
    batches: list[Any] = []
    seconds = cpu_sec(lambda: batches.extend(open_clip_batches(shard)))
    return {"seconds": seconds, "ids": digest([row for _, text in batches for row in text])}


# Our side ------------------------------------------------------------------------------------------------------------


def run_ours(shard: str, decode: str) -> dict[str, Any]:
    """One pass over a shard, through a loader that has been built before."""
    if (shard, decode) not in STATE:
        loader = build_loader(shard, decode)
        STATE[shard, decode] = loader, iter(loader)
    loader, batches = STATE[shard, decode]
    loader.dataset.tokens.forget()  # whole captions seldom come again in web data; words do, on both sides
    found: list[Any] = []
    seconds = cpu_sec(lambda: found.extend(next(batches) for _ in range(PICTURES // BATCH)))
    return {"seconds": seconds, "ids": digest([row for batch in found for row in batch.tokens])}


def build_loader(shard: str, decode: str) -> Any:
    """The training loader over one shard: an epoch is one pass."""
    from evatool.data.train.loader import build_train_loader
    from evatool.recipe.schema import TrainDataSection

    return build_train_loader(
        TrainDataSection(train=Path(shard), decode=decode),
        image_size=IMAGE_SIZE,
        context_length=CONTEXT_LENGTH,
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=0,
    )


def psnr(shard: str, decode: str) -> list[float]:
    """Of each picture of a shard against Pillow's bicubic of the same crop."""
    import torch
    from PIL import Image

    from evatool.data.image.decode import decode_image
    from evatool.data.image.train_transforms import TrainTransform, crop_boxes
    from evatool.data.tar.scan import scan_tar
    from evatool.data.train import shuffle
    from evatool.recipe.schema import AugmentSection

    section = AugmentSection()
    transform = TrainTransform(section, [IMAGE_SIZE], decode)
    data = Path(shard).read_bytes()
    members = [m for m in scan_tar(data).members if m.name.endswith(".jpg")]
    keys = shuffle.sample_keys(1, np.zeros(len(members), dtype=np.int64), np.arange(len(members)))
    files = [data[m.offset : m.offset + m.size] for m in members]
    decoded = [decode_image(f, mode=decode, min_side=transform.min_side) for f in files]
    (images,) = transform([torch.from_numpy(d).permute(2, 0, 1) for d in decoded], keys)
    boxes = crop_boxes(np.array([d.shape[:2] for d in decoded]), keys, section.crop_scale, section.crop_ratio)
    found = []
    for file, pixels, box, image in zip(files, decoded, boxes, images, strict=True):
        whole = Image.open(io.BytesIO(file)).convert("RGB")
        scale = round(whole.width / pixels.shape[1])
        top, left, height, width = (box * scale).tolist()
        crop = whole.crop((left, top, left + width, top + height)).resize((IMAGE_SIZE,) * 2, Image.Resampling.BICUBIC)
        error = ((np.asarray(crop).astype(float) - image.permute(1, 2, 0).numpy()) ** 2).mean()
        found.append(99.0 if error == 0 else 10 * math.log10(255**2 / error))
    return found


def digest(rows: list[Any]) -> str:
    """Of token rows, in whatever order they came."""
    return hashlib.sha256(b"".join(sorted(np.asarray(row, dtype=np.int64).tobytes() for row in rows))).hexdigest()


def main() -> None:
    """Print one row a size, then the means and the gates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve({"baseline": run_baseline, "ours": run_ours, "psnr": psnr, "versions": versions})
        return
    modes = ("fast", "scaled")
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker(__file__, baseline_python()) as baseline,
        Worker(__file__) as ours,
    ):
        bits = write_shards(Path(folder))
        shards = {f"{w}x{h}": f"{folder}/{w}x{h}/00000.tar" for w, h in SIZES}
        report: dict[str, Any] = {"machine": machine(), "ours": versions(), "baseline": baseline.call("versions")}
        report["sizes"], failures = {}, []
        for name, shard in shards.items():
            times: dict[str, list[float]] = {"baseline": [], **{mode: [] for mode in modes}}
            for _ in range(options.rounds):
                found = {"baseline": baseline.call("baseline", shard)}
                found.update({mode: ours.call("ours", shard, mode) for mode in modes})
                for side, result in found.items():
                    times[side].append(result["seconds"] / PICTURES)
                    if result["ids"] != found["baseline"]["ids"]:
                        failures.append(f"{name}: token ids of {side} differ from the baseline's")
            quality = {mode: ours.call("psnr", shard, mode) for mode in modes}
            report["sizes"][name] = row = {
                "bits_per_pixel": bits[name],
                "ms": {side: 1e3 * min(found) for side, found in times.items()},
                "ratio": {mode: min(times["baseline"]) / min(times[mode]) for mode in modes},
                "psnr_worst": {mode: min(quality[mode]) for mode in modes},
                "psnr_median": {mode: statistics.median(quality[mode]) for mode in modes},
            }
            print(
                f"{name:9s} {bits[name]:4.2f} bit/px  open_clip {row['ms']['baseline']:6.3f} ms"
                + "".join(
                    f"   {mode} {row['ms'][mode]:6.3f} ms = {row['ratio'][mode]:4.2f}x,"
                    f" {row['psnr_worst'][mode]:4.1f} dB worst, {row['psnr_median'][mode]:4.1f} median"
                    for mode in modes
                ),
                flush=True,
            )
    finish(report, [*failures, *judge(report, modes)], options.json)


def judge(report: dict[str, Any], modes: tuple[str, ...]) -> list[str]:
    """Print the means; returns what is below its gate."""
    rows = report["sizes"].values()
    mean = {mode: statistics.geometric_mean(row["ratio"][mode] for row in rows) for mode in modes}
    report["mean_ratio"] = mean
    worst = min(row["psnr_worst"]["fast"] for row in rows)
    median = statistics.median(row["psnr_median"]["scaled"] for row in rows)
    print(f"geometric mean: fast {mean['fast']:.2f}x, scaled {mean['scaled']:.2f}x")
    checks = [
        ("fast, geometric mean of the ratios", mean["fast"], LEAST_MEAN_RATIO),
        ("fast, least ratio", min(row["ratio"]["fast"] for row in rows), LEAST_RATIO),
        ("fast, PSNR of the worst picture", worst, LEAST_WORST_PSNR),
        ("scaled, geometric mean of the ratios", mean["scaled"], LEAST_SCALED_MEAN_RATIO),
        ("scaled, median PSNR", median, LEAST_SCALED_MEDIAN_PSNR),
    ]
    return [f"{name} is {found:.2f}, below {least}" for name, found, least in checks if found < least]


if __name__ == "__main__":
    main()
