"""The encoders and their checkpoints."""

from __future__ import annotations

from broken import COST, KEEP, SAFETY, TRAINING, Break, Promise

PROMISES = [
    Promise(
        KEEP,
        "Features equal those of open_clip and Hugging Face, and weights can be converted in both directions",
        tests=[
            "models/test_checkpoints.py::test_open_clip_both_ways",
            "models/test_checkpoints.py::test_hugging_face_clip_both_ways",
            "models/test_checkpoints.py::test_hugging_face_align_both_ways",
        ],
        breaks=[
            Break(
                "encoder: projections are not transposed",
                "fastclip/models/checkpoints/parameter_names.py",
                old='Rule(r"text\\.text_projection", "text_projection.weight", TRANSPOSED)',
                new='Rule(r"text\\.text_projection", "text_projection.weight")',
            ),
            Break(
                "encoder: keys before queries",
                "fastclip/models/checkpoints/parameter_names.py",
                old='_QKV = ("q_proj", "k_proj", "v_proj")',
                new='_QKV = ("k_proj", "q_proj", "v_proj")',
            ),
            Break(
                "encoder: the temperature is the scale",
                "fastclip/models/checkpoints/parameter_names.py",
                old="-theirs[0].reshape(()).log()",
                new="theirs[0].reshape(()).log()",
            ),
            Break(
                "encoder: ALIGN pads both sides",
                "fastclip/models/towers/image.py",
                old="size // 2 if both_sides else size // 2 - 1",
                new="size // 2",
            ),
            Break(
                "encoder: GELU in the ViT whatever the name",
                "fastclip/models/towers/image.py",
                old="act_layer=QuickGELU if quick_gelu else nn.GELU",
                new="act_layer=nn.GELU",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Models have the published numbers of parameters",
        tests=[
            "models/test_models.py::test_clip_has_open_clips_parameters",
            "models/test_models.py::test_published_parameters",
        ],
        breaks=[
            Break(
                "encoder: a bias on the projection",
                "fastclip/models/towers/image.py",
                old="nn.Linear(width, embed_dim, bias=False)",
                new="nn.Linear(width, embed_dim)",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Initial weights are drawn from the distributions of the published code",
        tests=[
            "models/test_models.py::test_clip_weights_start_as_published",
        ],
        breaks=[
            Break(
                "encoder: attention pooling starts as any layer",
                "fastclip/models/towers/image.py",
                old="nn.init.normal_(linear.weight, std=pool.in_features**-0.5)",
                new="pass",
            ),
        ],
    ),
    Promise(
        KEEP,
        "CoSwin is Swin with convolutional patch embedding and patch merging",
        tests=[
            "models/test_models.py::test_coswin_is_swin_with_convolutions_around_its_blocks",
            "models/test_models.py::test_coswin_windows_overlap",
        ],
        breaks=[
            Break(
                "encoder: Swin's last merging stays",
                "fastclip/models/towers/coswin.py",
                old="range(1, len(config.layers)):",
                new="range(1, len(config.layers) - 1):",
            ),
            Break(
                "encoder: Swin's embedding",
                "fastclip/models/towers/coswin.py",
                old="embed_layer=ConvEmbed",
                new="embed_layer=PatchEmbed",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "Loading a model unpickles nothing but tensors, numbers and strings, and never runs code of the file",
        tests=[
            "models/test_refused.py::test_no_pickle_runs",
        ],
        breaks=[
            Break(
                "encoder: pickles run",
                "fastclip/models/checkpoints/reading.py",
                old="weights_only=True",
                new="weights_only=False",
            ),
        ],
    ),
    Promise(
        SAFETY,
        "Only tensors are read from a TorchScript archive: its code never runs, and the sizes it declares are checked",
        tests=[
            "models/test_torchscript.py::test_no_code_of_an_archive_runs",
            "models/test_torchscript.py::test_claims_are_checked",
            "models/test_torchscript.py::test_tensors_are_those_of_torchs_loader",
        ],
        breaks=[
            Break(
                "archive: torch loads it",
                "fastclip/models/checkpoints/reading.py",
                old="read_torchscript(file) if archive",
                new="dict(torch.jit.load(file).state_dict()) if archive",
            ),
            Break(
                "archive: shapes are believed",
                "fastclip/models/checkpoints/torchscript.py",
                old="if count > len(numbers) or (count and last >= len(numbers)):",
                new="if False:",
            ),
            Break(
                "archive: one name a module",
                "fastclip/models/checkpoints/torchscript.py",
                old='waiting.append((f"{prefix}{name}.", value))',
                new='waiting.append((f"{name}.", value))',
            ),
        ],
    ),
    Promise(
        SAFETY,
        "No data or model file is executed: no pickle, TorchScript, remote code or image that starts a program",
        tests=[
            "package/test_opened.py::test_nothing_that_is_read_is_run",
        ],
        breaks=[
            Break(
                "opened: a tokenizer's own code",
                "fastclip/models/tokenizers/wordpiece.py",
                old="trust_remote_code=False",
                new="trust_remote_code=True",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Position embeddings of the weights override a conflicting image size or context length; the log reports "
        "it once",
        tests=[
            "models/test_sizes.py::test_features_are_open_clips_whatever_the_name_says",
            "models/test_sizes.py::test_sizes_are_found_in_every_form",
            "models/test_sizes.py::test_training_goes_on_with_the_weights_sizes",
        ],
        breaks=[
            Break(
                "sizes: the name's length",
                "fastclip/models/loading.py",
                old='        sizes["context_length"] = rows\n',
                new="        pass\n",
            ),
            Break(
                "sizes: the name's pictures",
                "fastclip/models/loading.py",
                old='            sizes["image_size"] = side * step\n',
                new="            pass\n",
            ),
            Break(
                "sizes: training's texts have the name's length",
                "fastclip/training/trainer.py",
                old="tokenizer_of(self.config, options.model)",
                new='tokenizer_of(load_config("ViT-tiny"), options.model)',
            ),
        ],
    ),
    Promise(
        KEEP,
        "`fastclip convert` and `save_pretrained` replace a model completely or not at all, and never "
        "overwrite their input",
        tests=[
            "models/test_convert.py::test_a_full_disk_leaves_the_old",
            "models/test_convert.py::test_a_source_is_not_overwritten",
            "models/test_convert.py::test_an_old_configuration_beside_new_weights_is_told",
        ],
        breaks=[
            Break(
                "convert: into the folder itself",
                "fastclip/models/checkpoints/writing.py",
                old="    with new_files(folder) as half:\n        yield half",
                new="    folder.mkdir(parents=True, exist_ok=True)\n    yield folder",
            ),
            Break(
                "convert: over its source",
                "fastclip/models/convert.py",
                old="if path.exists() and any(path.samefile(file) for file in read if file.exists()):",
                new="if False:",
            ),
            Break(
                "convert: another configuration passes",
                "fastclip/models/checkpoints/writing.py",
                old="if wanted is not None and wanted != _digest(config):",
                new="if False:",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Weights that are integers, 8-bit floats or NaN are refused with the name of the tensor",
        tests=[
            "models/test_refused.py::test_weights_of_another_kind_name_the_tensor",
        ],
        breaks=[
            Break(
                "weights: whole numbers pass",
                "fastclip/models/loading.py",
                old="(wanted.is_floating_point and tensor.dtype not in _FLOATS)",
                new="False",
            ),
            Break(
                "weights: NaN passes",
                "fastclip/models/loading.py",
                old="if tensor.numel() and not all(x.isfinite() for x in tensor.aminmax()):",
                new="if False:",
            ),
        ],
    ),
    Promise(
        KEEP,
        "16-bit and floating-point images keep their grey levels in the transforms of `load_image_transform`",
        tests=[
            "models/test_preprocess.py::test_more_than_eight_bits_are_scaled_and_not_cut_off",
        ],
        breaks=[
            Break(
                "transform: Pillow cuts 16 bits off",
                "fastclip/models/transforms.py",
                old="return eight_bits(image)",
                new="return image",
            ),
        ],
    ),
    Promise(
        KEEP,
        "A checkpoint that does not fit is refused with a list of its missing, unexpected and mis-shaped parameters",
        tests=[
            "models/test_refused.py::test_checkpoint_that_does_not_fit_names_the_parameters",
        ],
        breaks=[
            Break(
                "encoder: what is missing stays random",
                "fastclip/models/loading.py",
                old="if name not in given and name not in optional",
                new="if False",
            ),
        ],
    ),
    Promise(
        KEEP,
        "OpenAI's files get QuickGELU; a Hugging Face activation that contradicts the model's name is an error",
        tests=[
            "models/test_checkpoints.py::test_openai_means_quick_gelu",
            "models/test_checkpoints.py::test_hugging_face_activation_must_be_the_names",
        ],
        breaks=[
            Break(
                "encoder: OpenAI is not recognised",
                "fastclip/models/checkpoints/reading.py",
                old='if archive or "input_resolution" in tensors:',
                new="if False:",
            ),
            Break(
                "encoder: contradictions pass",
                "fastclip/models/loading.py",
                old="        if theirs is not None:",
                new="        if False:",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Position embeddings are interpolated as in open_clip, with a warning",
        tests=[
            "models/test_checkpoints.py::test_other_resolutions_interpolate_as_open_clip",
        ],
        breaks=[
            Break(
                "encoder: the class token is interpolated too",
                "fastclip/models/loading.py",
                old="num_prefix_tokens=1)",
                new="num_prefix_tokens=0)",
            ),
            Break(
                "encoder: interpolation is silent",
                "fastclip/models/loading.py",
                old='logger.warning("%s interpolated',
                new='logger.debug("%s interpolated',
            ),
        ],
    ),
    Promise(
        KEEP,
        "Tokenizers accept any text, and keep the end token of a text that they truncate",
        tests=[
            "models/test_preprocess.py::test_no_text_fails",
            "models/test_preprocess.py::test_wordpiece_is_transformers",
        ],
        breaks=[
            Break(
                "encoder: half surrogates",
                "fastclip/models/tokenizers/wordpiece.py",
                old='.encode("utf-8", "replace").decode()',
                new="",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Image transforms equal those of open_clip",
        tests=[
            "models/test_preprocess.py::test_clip_transforms_are_open_clips",
        ],
        breaks=[
            Break(
                "encoder: transforms resize bilinearly",
                "fastclip/models/transforms.py",
                old="InterpolationMode(options.interpolation)",
                new="InterpolationMode.BILINEAR",
            ),
        ],
    ),
    Promise(
        TRAINING,
        "A locked tower does not change, including the statistics of BatchNorm",
        tests=[
            "models/test_models.py::test_locked_tower_stays_as_it_is",
        ],
        breaks=[
            Break(
                "encoder: locked statistics move",
                "fastclip/models/dual_encoder.py",
                old="for name in self._locked:",
                new="for name in ():",
            ),
        ],
    ),
    Promise(
        COST,
        "The last block of CLIP's towers computes only the token that the head reads, with equal results",
        tests=[
            "models/test_last_block.py::test_the_class_token_is_that_of_all_patches",
            "models/test_last_block.py::test_the_end_of_a_text_is_that_of_all_tokens",
            "models/test_last_block.py::test_the_last_block_multiplies_one_token_beyond_keys_and_values",
        ],
        breaks=[
            Break(
                "encoder: the query of a patch",
                "fastclip/models/towers/image.py",
                old="F.scaled_dot_product_attention(q[:, :, :1], k, v)",
                new="F.scaled_dot_product_attention(q[:, :, 1:2], k, v)",
            ),
            Break(
                "encoder: the end sees what follows",
                "fastclip/models/towers/text.py",
                old="attn_mask=seen[:, None, None]",
                new="attn_mask=None",
            ),
            Break(
                "encoder: all patches through the last block",
                "fastclip/models/towers/image.py",
                old="x = last(x, class_token_only=True)",
                new="x = last(x)",
            ),
        ],
    ),
    Promise(
        COST,
        "Gradient checkpointing reduces memory and changes no gradient",
        tests=[
            "models/test_models.py::test_checkpointed_gradients_are_the_same",
        ],
        breaks=[
            Break(
                "encoder: one tower only",
                "fastclip/models/dual_encoder.py",
                old="for tower in (self.visual, self.text):",
                new="for tower in (self.text,):",
            ),
        ],
    ),
    Promise(
        KEEP,
        "Images that native code resizes have the same bits as Pillow's; Pillow resizes all others",
        tests=[
            "models/test_resize.py::test_native_resize_has_pillows_bits",
            "models/test_resize.py::test_steps_equal_torchvisions",
            "models/test_resize.py::test_pillow_resizes_what_native_code_does_not",
            "models/test_resize.py::test_pillow_with_other_bits_is_noticed",
        ],
        breaks=[
            Break(
                "resize: the columns come first too early",
                "fastclip/models/resize.py",
                old="height - new_height > 2 * (width - new_width)",
                new="height - new_height >= 2 * (width - new_width)",
            ),
            Break(
                "resize: the part of an image begins at its corner",
                "fastclip/models/resize.py",
                old="module.resize(array, *image.size, part, ",
                new="module.resize(array, *image.size, (0, 0, *part[2:]), ",
            ),
            Break(
                "resize: the longer side is rounded",
                "fastclip/models/resize.py",
                old="longer = int(",
                new="longer = round(",
            ),
            Break(
                "resize: bits are not compared with Pillow's",
                "fastclip/models/resize.py",
                old="if ours.tobytes() != image.resize",
                new="if False and ours.tobytes() != image.resize",
            ),
        ],
    ),
    Promise(
        KEEP,
        "ALIGN's images are resized to squares of 346 pixels, as in the paper; CLIP's keep their aspect ratio",
        tests=[
            "models/test_preprocess.py::test_align_transforms",
        ],
        breaks=[
            Break(
                "encoder: ALIGN's keep their sides",
                "fastclip/models/transforms.py",
                old='if options.resize_mode == "shortest" else',
                new="if options.resize_mode else",
            ),
        ],
    ),
]
