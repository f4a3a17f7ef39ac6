"""The plan of a recipe as data and as text, and the refusal of one that does not fit."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from evatool.core.errors import EvatoolError
from evatool.plan import memory as mem
from evatool.plan import towers
from evatool.plan.advice import Choice, choices, engines, enough_gpus, largest_micro_batch
from evatool.plan.costs import step_costs
from evatool.plan.estimate import learned_params, memory, operations
from evatool.plan.hardware import GPUS, Assumptions, Hardware
from evatool.plan.job import PlannedJob
from evatool.plan.pace import Pace, checkpoint_bytes, failures, host_bytes, pace
from evatool.plan.published import PARAMETERS

GIB = mem.GIB


@dataclass(frozen=True)
class Plan:
    """What a job needs: `data` is JSON-ready, `table` the memory by engine, `refusal` is set where it does not fit."""

    data: dict[str, Any]
    text: str
    table: list[list[str]]
    lines: list[str]
    refusal: EvatoolError | None


def make_plan(
    job: PlannedJob, gpu: Hardware, *, assumed: Assumptions | None = None, price_per_gpu_hour: float | None = None
) -> Plan:
    """Plan `job` on `gpu`."""
    assumed = assumed or Assumptions()
    paces = {name: pace(job, gpu, assumed, mfu) for name, mfu in zip(("low", "likely", "high"), gpu.mfu, strict=True)}
    likely, fitting = paces["likely"], choices(job, gpu, assumed)
    data = {
        "name": job.name,
        "stage": job.stage,
        "gpus": job.num_gpus,
        "gpu": {**asdict(gpu), "mfu": list(gpu.mfu)},
        "parameters": _parameters(job),
        "run": _run(job),
        "operations": {
            "per_sample": asdict(operations(job)),
            "total": operations(job).model * job.num_steps * job.global_batch_size,
        },
        "memory": _memory(job, gpu),
        "traffic": _traffic(likely),
        "data": {
            "samples_per_sec": likely.samples_per_sec,
            "bytes_per_sec": likely.samples_per_sec * assumed.bytes_per_sample,
            "loader_cores_per_gpu": likely.samples_per_sec / job.num_gpus / assumed.samples_per_core_sec,
            "epoch_bytes": job.num_steps * job.global_batch_size * assumed.bytes_per_sample,
        },
        "time": {name: _time(each, price_per_gpu_hour) for name, each in paces.items()},
        "checkpoints": _checkpoints(job, gpu, assumed, likely),
        "binding": "memory" if memory(job).total > gpu.memory_gib * GIB else likely.binding,
        "advice": [_choice(choice, job) for choice in _best(fitting, job)],
        "largest_micro_batch": largest_micro_batch(job, gpu),
        "assumptions": asdict(assumed),
        "notes": list(job.notes),
    }
    refusal = _refusal(job, gpu, fitting)
    data["fits"] = refusal is None
    return Plan(data, _text(job, data), _memory_table(job, gpu), _lines(job, gpu, data), refusal)


# ------------------------------------------------------------------------------------------------------------- data


def _parameters(job: PlannedJob) -> dict[str, Any]:
    counted = towers.count_parameters(job.model)
    frozen = sum(teacher.params for teacher in step_costs(job.step).teachers)
    learned = learned_params(job)
    return {
        "image": counted.image,
        "text": counted.text,
        "other": counted.other,
        "trainable": learned,
        "frozen": counted.total - learned + frozen,
        "published": PARAMETERS.get(job.model.name),
    }


def _run(job: PlannedJob) -> dict[str, Any]:
    samples = job.num_steps * job.global_batch_size
    image_tokens = towers.kept_tokens(job.model, job.patch_dropout)
    text_tokens = (job.text_tokens or job.model.context_length) if job.stage != "pretrain-mim" else 0
    return {
        "steps": job.num_steps,
        "samples": samples,
        "global_batch_size": job.global_batch_size,
        "micro_batch_size": job.micro_batch_size,
        "grad_accum_steps": job.accumulation,
        "image_tokens_per_sample": image_tokens,
        "text_tokens_per_sample": text_tokens,
        "tokens": samples * (image_tokens + text_tokens),
        "engine": job.engine,
        "zero_stage": job.zero_stage,
        "numerics": job.numerics,
        "offload": job.offload,
        "activation_checkpointing": job.checkpointing,
    }


def _memory(job: PlannedJob, gpu: Hardware) -> dict[str, Any]:
    own = memory(job)
    return {
        "bytes": own.total,
        "available_bytes": int(gpu.memory_gib * GIB),
        "parts": own.parts,
        "host_bytes_per_machine": host_bytes(job, gpu),
        "by_engine": {name: {"bytes": memory(each).total, **memory(each).parts} for name, each in engines(job).items()},
    }


def _traffic(likely: Pace) -> dict[str, Any]:
    traffic = likely.traffic
    return {
        "bytes_per_step": traffic.total,
        "weights_and_gradients": traffic.weights_and_gradients,
        "features": traffic.features,
        "seconds_per_step": traffic.seconds,
        "exposed_seconds": traffic.exposed_seconds,
        "is_hidden": traffic.exposed_seconds <= 0.01 * likely.step_sec,
    }


def _time(each: Pace, price: float | None) -> dict[str, Any]:
    known = {
        "mfu": each.mfu,
        "step_sec": each.step_sec,
        "samples_per_sec": each.samples_per_sec,
        "days": each.days,
        "gpu_hours": each.gpu_hours,
        "seconds_per_step": each.seconds,
        "binding": each.binding,
    }
    return known if price is None else known | {"cost": each.gpu_hours * price}


def _checkpoints(job: PlannedJob, gpu: Hardware, assumed: Assumptions, likely: Pace) -> dict[str, Any]:
    params = towers.count_parameters(job.model).total
    return {
        "export_bytes": mem.FP32 * params,
        # the next one is written before the oldest goes
        "kept_bytes": (job.kept_checkpoints + 1) * checkpoint_bytes(job),
        **asdict(failures(job, assumed, likely.step_sec)),
    }


def _best(fitting: list[Choice], job: PlannedJob) -> list[Choice]:
    """The fastest; the recipe itself if nothing beats it by more than 2 %."""
    own = next((choice for choice in fitting if choice.job == job), None)
    if own is not None and own.step_sec <= 1.02 * fitting[0].step_sec:
        return [own]
    return fitting[:1]


def _choice(choice: Choice, job: PlannedJob) -> dict[str, Any]:
    chosen = choice.job
    return {
        "settings": _settings(chosen, job),
        "memory_bytes": choice.memory_bytes,
        "step_sec": choice.step_sec,
        "micro_batch_size": chosen.micro_batch_size,
        "grad_accum_steps": chosen.accumulation,
        "activation_checkpointing": chosen.checkpointing,
        "is_the_recipe": chosen == job,
    }


def _settings(chosen: PlannedJob, job: PlannedJob) -> list[str]:
    """What `--set` must say to turn `job` into `chosen`."""
    settings = []
    if (chosen.engine, chosen.zero_stage, chosen.offload) != (job.engine, job.zero_stage, job.offload):
        settings = [f"engine.kind={chosen.engine}"]
        settings.append(f"engine.zero_stage={chosen.zero_stage}")
        settings.append(f"engine.offload={chosen.offload}")
    if chosen.checkpointing != job.checkpointing:
        settings.append(f"engine.activation_checkpointing={chosen.checkpointing}")
    if chosen.accumulation != job.accumulation:
        settings.append(f"train.micro_batch_size={chosen.micro_batch_size}")
    return settings


# ---------------------------------------------------------------------------------------------------------- refusal


def _refusal(job: PlannedJob, gpu: Hardware, fitting: list[Choice]) -> EvatoolError | None:
    need, room, host = memory(job).total, gpu.memory_gib * GIB, host_bytes(job, gpu)
    if need <= room and host <= gpu.host_gib * GIB:
        return None
    if need <= room:
        return EvatoolError(
            f"{job.name} offloads {_gib(host)} to a machine's own memory",
            expected=f"at most {gpu.host_gib:,.0f} GiB a machine, as is assumed",
            fix="--set engine.offload=none, or more ranks",
        )
    fixes = []
    if fitting:
        keys = " ".join(f"--set {key}" for key in _settings(fitting[0].job, job))
        fixes.append(f"{keys} needs {_gib(fitting[0].memory_bytes)} a rank")
    ranks = enough_gpus(job, gpu)
    if ranks and ranks > job.num_gpus:
        fixes.append(f"--gpus {ranks} fits as it is")
    batch = _batch_that_fits(job, gpu)
    if batch:
        fixes.append(f"train.global_batch_size = {batch} fits on {job.num_gpus}, as another run")
    if not fitting:
        fixes += _larger_accelerator(job, gpu)
    name, size = max(memory(job).parts.items(), key=lambda part: part[1])
    return EvatoolError(
        f"{job.name} needs {_gib(need)} a rank, {_gib(need - room)} more than one {gpu.name} has; most of it "
        f"is {name}, {_gib(size)}",
        expected=f"at most {_gib(room)} on each of {job.num_gpus} ranks",
        fix="; or ".join(fixes) or "a smaller model: nothing else fits",
    )


def _larger_accelerator(job: PlannedJob, gpu: Hardware) -> list[str]:
    """The smallest accelerator on whose ranks some setting fits, in words."""
    larger = sorted(
        (each for each in GPUS if each.memory_gib > gpu.memory_gib),
        key=lambda each: (each.memory_gib, each.bf16_tflops),
    )
    for each in larger:
        fitting = choices(job, each, Assumptions())
        if fitting:
            keys = "".join(f" --set {key}" for key in _settings(fitting[0].job, job))
            return [f"--gpu {each.name}{keys} needs {_gib(fitting[0].memory_bytes)} a rank"]
    return []


def _batch_that_fits(job: PlannedJob, gpu: Hardware) -> int | None:
    """The first halving of a rank's samples that fits without any other change, as a global batch."""
    each = job.micro_batch_size // 2
    while each > 0:
        batch = each * job.num_gpus
        if memory(replace(job, global_batch_size=batch)).total <= gpu.memory_gib * GIB:
            return batch
        each //= 2
    return None


# ------------------------------------------------------------------------------------------------------------- text


def _text(job: PlannedJob, data: dict[str, Any]) -> str:
    p, r, ops = data["parameters"], data["run"], data["operations"]
    per_sample = ops["per_sample"]
    published = f"; published: {p['published']}" if p["published"] else ""
    rows = [
        ("run", f"{job.name}: {job.stage} of {job.model.name} on {job.num_gpus} x {data['gpu']['name']}"),
        (
            "parameters",
            f"{p['trainable']:,} trainable (image {p['image']:,}, text {p['text']:,}, other {p['other']:,}), "
            f"{p['frozen']:,} frozen{published}",
        ),
        (
            "length",
            f"{r['steps']:,} steps of {r['global_batch_size']:,} = {r['samples']:,} samples, "
            f"{r['tokens']:.3g} tokens ({r['image_tokens_per_sample']} of a picture, "
            f"{r['text_tokens_per_sample']} of a caption)",
        ),
        (
            "rank",
            f"{r['micro_batch_size']} samples a pass, {_times(r['grad_accum_steps'])} a step; engine {r['engine']}"
            + (f" stage {r['zero_stage']}" if job.engine == "deepspeed" else "")
            + (f", offload {r['offload']}" if r["offload"] != "none" else "")
            + f", {r['numerics']}, checkpointing {r['activation_checkpointing']}",
        ),
        (
            "operations",
            f"{per_sample['model'] / 1e9:,.4g} GFLOP a sample (forward: image {per_sample['image'] / 1e9:,.4g}, "
            f"text {per_sample['text'] / 1e9:,.4g}, teacher {per_sample['teacher'] / 1e9:,.4g}), "
            f"{ops['total']:.3g} FLOP in all",
        ),
    ]
    return "\n".join(f"{label:<11} {value}" for label, value in rows)


def _memory_table(job: PlannedJob, gpu: Hardware) -> list[list[str]]:
    by_engine = {name: memory(each) for name, each in engines(job).items()}
    names = list(next(iter(by_engine.values())).parts)
    rows = [["GiB a rank", *by_engine]]
    rows += [[name, *(f"{m.parts[name] / GIB:.2f}" for m in by_engine.values())] for name in names]
    rows.append(["with fragmentation", *(f"{m.total / GIB:.2f}" for m in by_engine.values())])
    room = gpu.memory_gib * GIB
    return [*rows, [f"fits {gpu.memory_gib:.1f}", *("yes" if m.total <= room else "no" for m in by_engine.values())]]


def _lines(job: PlannedJob, gpu: Hardware, data: dict[str, Any]) -> list[str]:
    saves, traffic, time, reading = data["checkpoints"], data["traffic"], data["time"], data["data"]
    lines = [
        f"{name:<7} {each['mfu']:.0%} of peak: {_seconds(each['step_sec'])} a step, "
        f"{each['samples_per_sec']:,.0f} samples/s, {each['days']:,.3g} days, {_count(each['gpu_hours'])} GPU-hours"
        + (f", cost {_count(each['cost'])}" if "cost" in each else "")
        for name, each in time.items()
    ]
    if data["memory"]["host_bytes_per_machine"]:
        lines.append(f"offload: {_gib(data['memory']['host_bytes_per_machine'])} of a machine's own memory")
    lines += [
        f"network: {_size(traffic['bytes_per_step'])} a rank and step, {_seconds(traffic['seconds_per_step'])}; "
        + ("hidden behind computation" if traffic["is_hidden"] else f"{_seconds(traffic['exposed_seconds'])} exposed"),
        f"data: {_size(reading['bytes_per_sec'])}/s to read, {reading['loader_cores_per_gpu']:.1f} loader cores a rank",
        f"checkpoint: {_size(saves['checkpoint_bytes'])}, {_size(saves['kept_bytes'])} of disk for those kept, "
        f"export {_size(saves['export_bytes'])}",
        f"failures: {saves['expected']:.2g} expected, one in {saves['mean_hours_between']:,.0f} h; save every "
        f"{_seconds(saves['interval_sec'])} ({saves['interval_steps']:,} steps); {saves['goodput']:.1%} of the time "
        "is training",
        f"binding: {data['binding']}",
    ]
    for each in data["advice"]:
        advice = "this recipe" if each["is_the_recipe"] else " ".join(f"--set {key}" for key in each["settings"])
        lines.append(f"advice: {advice}: {_gib(each['memory_bytes'])} a rank, {_seconds(each['step_sec'])} a step")
    if not data["advice"]:
        lines.append("advice: nothing fits on these ranks")
    lines.append(f"largest micro-batch of this engine: {data['largest_micro_batch']}")
    a = data["assumptions"]
    lines.append(
        f"assumed: {gpu.source}; {a['bytes_per_sample']:,.0f} bytes a sample, {a['samples_per_core_sec']:.0f} "
        f"samples/s a core, {a['storage_gb_per_sec']:g} GB/s of storage, saves at {a['save_gb_per_sec']:g} GB/s a "
        f"rank, a failure every {a['gpu_hours_per_failure']:,.0f} GPU-hours; {a['host_gb_per_sec']:g} GB/s to main "
        f"memory, {gpu.host_gib:,.0f} GiB of it a machine, {a['cpu_steps_per_sec']:.2g} parameters/s of "
        f"a step on the CPU; selective checkpointing repeats {a['selective_share']:.0%} of a step"
    )
    return [*lines, *(f"note: {note}" for note in job.notes)]


def _times(number: int) -> str:
    return "one" if number == 1 else str(number)


def _count(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _size(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"


def _seconds(value: float) -> str:
    if value >= 3600:
        return f"{value / 3600:.3g} h"
    if value >= 120:
        return f"{value / 60:.3g} min"
    return f"{value:.3g} s" if value >= 1 or value == 0 else f"{value * 1e3:.3g} ms"
