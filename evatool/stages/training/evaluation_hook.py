"""Zero-shot evaluation while a model trains, on chosen sets of a suite, every rank taking its share of the pictures."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from evatool.core.image_norm import normalize_for
from evatool.data.eval.eval_set import EvalSet, open_eval_set
from evatool.data.image.eval_transforms import EvalTransform
from evatool.data.tokenizer import build_tokenizer
from evatool.distributed.engines.amp import autocast
from evatool.distributed.world import World
from evatool.eval.encode import Encoding
from evatool.eval.encoder import SetEncoder
from evatool.eval.suite import find_sets, load_suite
from evatool.eval.tasks.build import task_of
from evatool.model.config import ModelConfig
from evatool.model.text import encode_text, is_trimmable
from evatool.recipe.schema import EvaluateSection
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)

_SHORT_NAMES = {"text_to_image_recall@5": "t2i_r5", "image_to_text_recall@5": "i2t_r5"}


class Evaluation(Hook):
    """Puts `eval/<set>/top1`, or `eval/<set>/t2i_r5` and `i2t_r5`, into the records of every `every_steps`-th step.

    Listed before the hooks that write records. The weights are whole while it runs, on every engine; the arithmetic is
    the run's own precision.

    Args:
        section: the recipe's `[evaluate]`.
        model: the CLIP model within the objective.
        config: its configuration.
    Raises: DataError, at once, where a set is missing or wrong.
    """

    def __init__(
        self, section: EvaluateSection, model: nn.Module, config: ModelConfig, world: World, precision: str
    ) -> None:
        self._every_steps, self._model, self._device = section.every_steps, _Towers(model), world.device
        self._precision, self._lockstep = precision, world.world_size > 1
        self._trims_text = is_trimmable(model.text)
        self._tokenizer = build_tokenizer(config.context_length)
        suite = load_suite(section.suite)
        chosen = [entry for entry in suite.chosen(section.sets) if entry.compose is None]
        folders = find_sets(section.data, suite, chosen)
        self._sets: Sequence[EvalSet] = [
            open_eval_set(
                folders[entry.name],
                transform=EvalTransform.of(config.input, config.input_size),
                batch_size=section.batch_size,
                split=entry.split,
                rank=world.rank,
                world_size=world.world_size,
                name=entry.name,
                prompts=entry.prompts,
            )
            for entry in chosen
        ]

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if result.step % self._every_steps == 0 or result.step == trainer.config.num_steps:
            metrics = self._evaluate(trainer)
            result.add_metrics(metrics)
            log.info("step %d  %s", result.step, "  ".join(f"{key} {value:.4f}" for key, value in metrics.items()))

    def _evaluate(self, trainer: TrainerControl) -> dict[str, float]:
        metrics: dict[str, float] = {}
        was_training = trainer.objective.training
        trainer.objective.eval()
        try:
            with torch.no_grad(), trainer.engine.summon_full_weights(), autocast(self._precision, self._device):
                for opened in self._sets:
                    metrics |= self._metrics(opened)
        finally:
            trainer.objective.train(was_training)
        return metrics

    def _metrics(self, opened: EvalSet) -> dict[str, float]:
        how = Encoding(str(self._device), self._trims_text, self._lockstep)
        task = task_of(opened.kind)
        predictions = task.run(SetEncoder(self._model, self._tokenizer, how), opened).predictions
        main = [m for m in predictions.metrics() if m.metric in task.wording.main_metrics]
        return {f"eval/{opened.name}/{_SHORT_NAMES.get(m.metric, m.metric)}": m.value for m in main}


class _Towers:
    """A CLIP model in training with the face of a loaded one."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def encode_image(self, image: Tensor) -> Tensor:
        dtype = next(self._model.parameters()).dtype
        pixels = normalize_for(self._model, image, dtype) if image.dtype == torch.uint8 else image
        features: Tensor = self._model.encode_image(pixels).float()  # type: ignore[operator]
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        # Texts of about one length come together, and a rank may have fewer of them than another: one pass on each.
        return encode_text(self._model, tokens, max_groups=1).float()
