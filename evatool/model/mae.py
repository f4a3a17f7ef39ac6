"""EVA-L: a masked autoencoder that regresses CLIP features. The encoder sees only what is not masked."""

from __future__ import annotations

from functools import partial

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from evatool.model.config import ModelConfig

# B batch, S input side in pixels, N patches, V visible patches of a sample, M masked patches of the batch,
# D encoder width, W decoder width, T teacher features

_NORM = partial(LayerNorm, eps=1e-6)


class MaeModel(nn.Module):
    """Predicts a teacher's patch features at masked places from the visible patches alone.

    Source: EVA-01/eva/modeling_mae_pretrain.py (docs/reference/eva.md#masked-image-models and #mim-student).
    """

    pos_embed: Tensor  # (1, 1 + N, D)
    decoder_pos_embed: Tensor  # (1, 1 + N, W)

    def __init__(self, config: ModelConfig, predict_dim: int, drop_path_rate: float) -> None:
        super().__init__()
        assert config.decoder is not None, f"{config.name} has no decoder"
        self.config = config
        width, decoder = config.width, config.decoder
        self.visual = VisionTransformer(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=width,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.vision["mlp_ratio"],
            norm_layer=_NORM,
            drop_path_rate=drop_path_rate,
            pos_embed="none",
            num_classes=0,
            global_pool="token",
        )
        self.decoder_embed = nn.Linear(width, decoder["width"])
        self.mask_token = nn.Parameter(torch.empty(1, 1, decoder["width"]))
        self.decoder_blocks = nn.ModuleList(
            Block(decoder["width"], decoder["heads"], mlp_ratio=4.0, qkv_bias=True, norm_layer=_NORM)
            for _ in range(decoder["layers"])
        )
        self.decoder_norm = _NORM(decoder["width"])
        self.lm_head = nn.Linear(decoder["width"], predict_dim)
        self.register_buffer("pos_embed", sincos_positions(config.grid, width), persistent=False)
        self.register_buffer("decoder_pos_embed", sincos_positions(config.grid, decoder["width"]), persistent=False)
        self._init_weights()

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted features at the masked patches.

        Args:
            image: (B, 3, S, S) float, normalised.
            mask: (B, N) bool, True where the patch is hidden; every sample hides equally many.
        Returns: (M, T), row by row over the batch: the order of `teacher_features[mask]`.
        Raises: ValueError if the samples hide different numbers of patches.
        """
        predicted: Tensor = self.lm_head(self._decode(self._encode(image, mask), mask)[:, 1:][mask])
        return predicted

    def predict_all(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted features (B, N, T) at all patches, for looking at."""
        predicted: Tensor = self.lm_head(self._decode(self._encode(image, mask), mask)[:, 1:])
        return predicted

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the encoder's activations in the backward pass instead of keeping them."""
        self.visual.set_grad_checkpointing(enable)

    def _encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """(B, 1 + V, D), the class token first."""
        counts = mask.sum(dim=1)
        if bool((counts != counts[0]).any()):
            raise ValueError("a masked autoencoder needs equally many masked patches in every sample")
        x = self.visual.patch_embed(image) + self.pos_embed[:, 1:]
        x = x[~mask].reshape(x.shape[0], -1, x.shape[2])
        cls = (self.visual.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1)
        encoded: Tensor = self.visual.norm(self.visual.blocks(torch.cat([cls, x], dim=1)))
        return encoded

    def _decode(self, encoded: Tensor, mask: Tensor) -> Tensor:
        """(B, 1 + N, W) in the order of the patches, hidden ones filled in."""
        x = self.decoder_embed(encoded)
        tokens = self.mask_token.to(x.dtype).expand(*mask.shape, -1).clone()
        tokens[~mask] = x[:, 1:].flatten(0, 1)
        x = torch.cat([x[:, :1], tokens], dim=1) + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        decoded: Tensor = self.decoder_norm(x)
        return decoded

    def init_non_persistent_buffers(self) -> None:
        """Recompute the position tables, after a build on the meta device."""
        for name, width in (("pos_embed", self.config.width), ("decoder_pos_embed", self.mask_token.shape[-1])):
            getattr(self, name).copy_(sincos_positions(self.config.grid, width))

    def _init_weights(self) -> None:
        """Xavier-uniform matrices and normal tokens of std 0.02, which are MAE's."""
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)
                if part.bias is not None:
                    nn.init.zeros_(part.bias)
        patch_weight = self.visual.patch_embed.proj.weight
        nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))
        for token in (self.visual.cls_token, self.mask_token):
            nn.init.normal_(token, std=0.02)


def sincos_positions(grid: tuple[int, int], width: int) -> Tensor:
    """A fixed 2-D sine-cosine table (1, 1 + rows * columns, width); the class token's entry is zero.

    MAE's order: the first half of the channels encodes the column, the second the row, sines before cosines.
    """
    quarter = width // 4
    frequency = 1.0 / 10000 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, columns = torch.meshgrid(*(torch.arange(side, dtype=torch.float64) for side in grid), indexing="ij")
    halves = []
    for positions in (columns, rows):
        angle = positions.reshape(-1, 1) * frequency
        halves += [angle.sin(), angle.cos()]
    table = torch.cat(halves, dim=1).float()
    return torch.cat([torch.zeros(1, width, dtype=table.dtype, device=table.device), table])[None]
