"""The objective of a CLIP model: a list of losses on the features of its two towers."""

# B this rank's batch, L text tokens, E embedding

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.image_norm import normalize_for
from evatool.core.param_group import ParamOwner
from evatool.core.step import StepContext
from evatool.model.features import l2_normalize, logit_scale
from evatool.model.text import encode_text, fit_tokens
from evatool.objective.base import START, FeatureObjective, Features
from evatool.objective.terms.base import LossTerm, OwnPart
from evatool.recipe.schema.distill import weight_at


class ClipObjective(FeatureObjective):
    """A CLIP model and the losses that it learns from, added up with their weights.

    Args:
        model: an open_clip `CustomTextCLIP`-like module with `encode_image`, `encode_text`, `text` and `logit_scale`
            (the logarithm, shape (1,) or ()). Terms may set its temperature, and freeze it.
        terms: the losses, in the order in which they are added; each of them is of this objective alone.
        context_length: text tokens of the model where batches may hold more, which are then cut to it; None where they
            hold as many as the model takes.
    """

    def __init__(self, model: nn.Module, terms: Sequence[LossTerm], *, context_length: int | None = None) -> None:
        super().__init__()
        assert terms, "an objective without losses teaches nothing"
        self.model = model
        self.terms = tuple(terms)
        self._context_length = context_length
        self._owners: dict[str, ParamOwner] = {}
        bounds: dict[str, tuple[float, float]] = {}
        for term in self.terms:
            term.prepare(model)
            for name, part in term.attach(self).items():
                self._register(name, part)
            bounds |= term.parameter_bounds
            if term.starts_at_ln_batch:
                self.chance_loss = term.name if len(self.terms) > 1 else "loss"
        self.parameter_bounds = bounds

    def _register(self, name: str, part: OwnPart) -> None:
        """Make a term's part this module's own, under the name that checkpoints know it by."""
        if name in self._owners:
            assert getattr(self, name) is part.value, f"two terms have different parts under the name {name!r}"
            return
        assert not hasattr(self, name), f"{name!r} is no name for a term's part: the objective has it already"
        self._owners[name] = part.owner
        match part.value:
            case nn.Module():
                self.add_module(name, part.value)
            case nn.Parameter():
                self.register_parameter(name, part.value)
            case _:
                self.register_buffer(name, part.value)

    def parameter_owners(self) -> dict[str, ParamOwner]:
        names = [name for name, _ in self.named_parameters() if not name.startswith("model.")]
        return {name: self._owners[name.partition(".")[0]] for name in names}

    def encode(self, batch: Batch) -> Features:
        batch = self._fitted(batch)
        for term in self.terms:
            missing = [field for field in term.batch_fields if getattr(batch, field) is None]
            assert not missing, f"{term.name} needs {', '.join(missing)} in its batches"
        image, text = encode_pair(self.model, batch)
        features = {"image": image, "text": text, "scale": logit_scale(self.model)}
        for term in self.terms:
            _add(features, term.encode(self.model, batch, features), term)
        return features

    def targets(self, batch: Batch) -> Features:
        found: Features = {}
        for term in self.terms:
            _add(found, term.targets(batch, found), term)
        return found

    def losses(self, features: Features, batch: Batch, step: StepContext = START) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Returns: `loss`, the weighted sum with gradient; for the log each term's loss, unweighted, under its name where
            there are several, what terms log beside it, and `logit_scale` (exponentiated).
        """
        total: Tensor | None = None
        parts: LossDict = {}
        logs: LossDict = {}
        for term in self.terms:
            loss, logged = term.loss(features, batch)
            # Also at weight 0: every parameter then takes part in each step, which the multi-rank engines ask for.
            weighted = term.weight_at(step) * loss
            total = weighted if total is None else total + weighted
            parts[term.name] = loss.detach()
            logs |= logged
        assert total is not None
        named = parts if len(self.terms) > 1 else {}
        return {"loss": total, **named, **logs, "logit_scale": features["scale"].detach()}

    def weights(self, step: StepContext) -> dict[str, float]:
        """The weight of each loss at this step, by its name, without the factors of teachers."""
        return {term.weight_name: weight_at(term.weight, step.samples_seen) for term in self.terms}

    def changing_weights(self, step: StepContext) -> dict[str, float]:
        changing = {term.weight_name for term in self.terms if isinstance(term.weight, tuple)}
        weights = self.weights(step)
        return {name: weights[name] for name in sorted(changing)}

    def _fitted(self, batch: Batch) -> Batch:
        """The batch at the model's context length: captions are tokenized once, for the longest of all contexts."""
        if self._context_length is None:
            return batch
        assert batch.tokens is not None, "a contrastive objective needs tokens in its batches"
        assert batch.text_lengths is not None
        lengths = batch.text_lengths.clamp(max=self._context_length)
        return replace(batch, tokens=fit_tokens(batch.tokens, self._context_length), text_lengths=lengths)


def _add(features: Features, new: Features, term: LossTerm) -> None:
    twice = sorted(features.keys() & new.keys())
    assert not twice, f"{term.name} makes features that others made: {', '.join(twice)}"
    features |= new


def encode_pair(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Unit-length image and text features (B, E) of one batch, float32 or wider; no work goes into padding."""
    assert batch.tokens is not None, "a contrastive objective needs tokens in its batches"
    dtype = next(model.parameters()).dtype
    image_features: Tensor = model.encode_image(normalize_for(model, batch.image, dtype))  # type: ignore[operator]
    text_features = encode_text(model, batch.tokens, batch.text_lengths)
    return l2_normalize(image_features), l2_normalize(text_features)
