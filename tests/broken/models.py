"""The encoders."""

from __future__ import annotations

from broken import Break, Promise

MODELS = "models/test_models.py"
CHECKPOINTS = "models/test_checkpoints.py"
PREPROCESS = "models/test_preprocess.py"
REFUSED = "models/test_refused.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Encoders": [
        Promise(
            "encoder features equal open_clip's and Hugging Face's on the same weights, in both directions",
            (f"{CHECKPOINTS}::test_open_clip_both_ways", f"{CHECKPOINTS}::test_hugging_face_clip_both_ways", f"{CHECKPOINTS}::test_hugging_face_align_both_ways"),
            (
                Break("encoder: projections are not transposed", "fastclip/models/conversion.py", 'Rule(r"text\\.text_projection", "text_projection.weight", TRANSPOSED)', 'Rule(r"text\\.text_projection", "text_projection.weight")'),
                Break("encoder: keys before queries", "fastclip/models/conversion.py", '_QKV = ("q_proj", "k_proj", "v_proj")', '_QKV = ("k_proj", "q_proj", "v_proj")'),
                Break("encoder: the temperature is the scale", "fastclip/models/conversion.py", "-theirs[0].reshape(()).log()", "theirs[0].reshape(()).log()"),
                Break("encoder: ALIGN pads both sides", "fastclip/models/image_towers.py", "size // 2 if both_sides else size // 2 - 1", "size // 2"),
                Break("encoder: GELU in the ViT whatever the name", "fastclip/models/image_towers.py", "act_layer=QuickGELU if quick_gelu else nn.GELU", "act_layer=nn.GELU"),
            ),
        ),
        Promise("encoder sizes are the published ones", (f"{MODELS}::test_clip_has_open_clips_parameters", f"{MODELS}::test_published_parameters"), (Break("encoder: a bias on the projection", "fastclip/models/image_towers.py", "nn.Linear(width, embed_dim, bias=False)", "nn.Linear(width, embed_dim)"),)),
        Promise("encoder weights start as published", (f"{MODELS}::test_clip_weights_start_as_published",), (Break("encoder: attention pooling starts as any layer", "fastclip/models/image_towers.py", "nn.init.normal_(linear.weight, std=pool.in_features**-0.5)", "pass"),)),
        Promise("CoSwin is Swin but for its embedding and every merging", (f"{MODELS}::test_coswin_is_swin_with_convolutions_around_its_blocks", f"{MODELS}::test_coswin_windows_overlap"), (Break("encoder: Swin's last merging stays", "fastclip/models/coswin.py", "range(1, len(config.layers)):", "range(1, len(config.layers) - 1):"), Break("encoder: Swin's embedding", "fastclip/models/coswin.py", "embed_layer=ConvEmbed", "embed_layer=PatchEmbed"))),
        Promise("no pickle of a checkpoint runs", (f"{REFUSED}::test_no_pickle_runs",), (Break("encoder: pickles run", "fastclip/models/checkpoint.py", "weights_only=True", "weights_only=False"),)),
        Promise("a checkpoint that does not fit names missing, unexpected and mis-shaped parameters", (f"{REFUSED}::test_checkpoint_that_does_not_fit_names_the_parameters",), (Break("encoder: what is missing stays random", "fastclip/models/factory.py", "if missing or unexpected or shapes:", "if unexpected or shapes:"),)),
        Promise(
            "OpenAI's files mean QuickGELU, and it is said; a Hugging Face activation that contradicts the name raises",
            (f"{CHECKPOINTS}::test_openai_means_quick_gelu", f"{CHECKPOINTS}::test_hugging_face_activation_must_be_the_names"),
            (
                Break("encoder: OpenAI is not recognised", "fastclip/models/checkpoint.py", 'if archive or "input_resolution" in tensors:', "if False:"),
                Break("encoder: contradictions pass", "fastclip/models/factory.py", "        if theirs is not None:\n            kinds", "        if False:\n            kinds"),
            ),
        ),
        Promise("position embeddings interpolate as open_clip's, and it is said", (f"{CHECKPOINTS}::test_other_resolutions_interpolate_as_open_clip",), (Break("encoder: the class token is interpolated too", "fastclip/models/factory.py", "num_prefix_tokens=1)", "num_prefix_tokens=0)"), Break("encoder: interpolation is silent", "fastclip/models/factory.py", 'logger.warning("%s interpolated', 'logger.debug("%s interpolated'))),
        Promise("tokenizers never fail on a text, and cut texts keep their end", (f"{PREPROCESS}::test_no_text_fails", f"{PREPROCESS}::test_wordpiece_is_transformers"), (Break("encoder: half surrogates", "fastclip/models/wordpiece.py", '.encode("utf-8", "replace").decode()', ""),)),
        Promise("the image transforms are open_clip's", (f"{PREPROCESS}::test_clip_transforms_are_open_clips",), (Break("encoder: transforms resize bilinearly", "fastclip/models/transforms.py", "InterpolationMode(options.interpolation)", "InterpolationMode.BILINEAR"),)),
        Promise("a locked tower stays as it is, BatchNorm included", (f"{MODELS}::test_locked_tower_stays_as_it_is",), (Break("encoder: locked statistics move", "fastclip/models/dual_encoder.py", "        for name in self._locked:\n            self.get_submodule(name).eval()\n        return self", "        return self"),)),
        Promise("gradient checkpointing keeps less and changes no gradient", (f"{MODELS}::test_checkpointed_gradients_are_the_same",), (Break("encoder: one tower only", "fastclip/models/dual_encoder.py", "for tower in (self.visual, self.text):", "for tower in (self.text,):"),)),
        Promise("ALIGN's pictures become squares of 346 pixels, as the paper says, CLIP's keep their sides", ("models/test_preprocess.py::test_align_transforms",), (Break("encoder: ALIGN's keep their sides", "fastclip/models/transforms.py", 'if options.resize_mode == "shortest" else', "if options.resize_mode else"),)),
    ],
}
# fmt: on
