"""Writes the files beside it: a tiny CLIP as transformers names it, and one as OpenAI published theirs.

    python make.py

`transformers/`: config.json, model.safetensors in two shards with an index, expected.safetensors (inputs, outputs).
`openai.pt`: a TorchScript archive of an open_clip model with OpenAI's names, half precision; `openai.expected`.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
IMAGE, CONTEXT, VOCABULARY = 28, 16, 60


def inputs():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCABULARY - 1, (3, CONTEXT), generator=generator)
    for row, end in enumerate((4, 9, CONTEXT)):
        tokens[row, end - 1] = VOCABULARY - 1
        tokens[row, end:] = 0
    return torch.randn(2, 3, IMAGE, IMAGE, generator=generator), tokens


def make_transformers():
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(1)
    towers = {"num_hidden_layers": 2, "hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
    config = CLIPConfig(
        projection_dim=20,
        vision_config=towers
        | {"hidden_size": 32, "intermediate_size": 128, "num_attention_heads": 2, "image_size": IMAGE, "patch_size": 7},
        text_config=towers
        | {
            "hidden_size": 24,
            "intermediate_size": 96,
            "num_attention_heads": 2,
            "max_position_embeddings": CONTEXT,
            "vocab_size": VOCABULARY,
            "eos_token_id": VOCABULARY - 1,
        },
    )
    model = CLIPModel(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms are not trivial in a trained model
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.2)
    folder = HERE / "transformers"
    model.save_pretrained(folder, max_shard_size="60KB")
    image, tokens = inputs()
    with torch.no_grad():
        out = model(input_ids=tokens, pixel_values=image)
        visual = model.vision_model(pixel_values=image)
        projected = model.visual_projection(model.vision_model.post_layernorm(visual.last_hidden_state[:, 1:]))
        text = model.text_projection(model.text_model(input_ids=tokens).pooler_output)
        features = model.visual_projection(visual.pooler_output)
    torch.testing.assert_close(torch.nn.functional.normalize(features, dim=-1), out.image_embeds)
    expected = {"image_features": features, "text_features": text, "visual_tokens": projected}
    save_file({"image": image, "tokens": tokens} | expected, folder / "expected.safetensors")


class OpenAI(torch.nn.Module):
    """OpenAI's module tree: the text tower's parts at the root."""

    def __init__(self, clip):
        super().__init__()
        self.visual = clip.visual
        self.transformer = clip.transformer
        self.token_embedding = clip.token_embedding
        self.ln_final = clip.ln_final
        self.positional_embedding = clip.positional_embedding
        self.text_projection = clip.text_projection
        self.logit_scale = clip.logit_scale
        self.register_buffer("input_resolution", torch.tensor(IMAGE))
        self.register_buffer("context_length", torch.tensor(CONTEXT))
        self.register_buffer("vocab_size", torch.tensor(VOCABULARY))

    def forward(self, image):
        return self.visual(image)


def make_openai():
    import open_clip

    torch.manual_seed(2)
    clip = open_clip.CLIP(
        embed_dim=20,
        vision_cfg={"image_size": IMAGE, "layers": 2, "width": 64, "head_width": 64, "patch_size": 7},
        text_cfg={"context_length": CONTEXT, "vocab_size": VOCABULARY, "width": 24, "heads": 2, "layers": 2},
        quick_gelu=True,
    ).eval()
    for parameter in clip.parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.2)
        parameter.data = parameter.data.half().float()
    image, tokens = inputs()
    with torch.no_grad():
        expected = {"image_features": clip.encode_image(image), "text_features": clip.encode_text(tokens)}
        traced = torch.jit.trace(OpenAI(clip), image)
    for parameter in traced.parameters():
        parameter.data = parameter.data.half()
    traced.save(str(HERE / "openai.pt"))
    save_file({"image": image, "tokens": tokens} | expected, HERE / "openai.expected")


make_transformers()
make_openai()
