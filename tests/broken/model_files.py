"""The files beside a model's weights: reading and writing them."""

from __future__ import annotations

from broken import KEEP, Break, Promise

PROMISES = [
    Promise(
        KEEP,
        "Images, and ALIGN's texts, are processed as a Hugging Face model folder configures it, or the "
        "folder is refused",
        tests=[
            "models/test_processor.py::test_pictures_are_transformers",
            "models/test_processor.py::test_a_whole_processor_goes_first",
            "models/test_processor.py::test_what_is_not_done_to_pictures_is_refused",
            "models/test_refused.py::test_open_clips_pictures_of_another_kind_are_refused",
            "models/test_processor.py::test_bert_vocabulary_is_transformers",
            "models/test_processor.py::test_tokenizers_of_other_kinds_are_refused",
            "models/test_processor.py::test_options_of_another_tokenizer_are_refused",
            "models/test_processor.py::test_pictures_and_texts_of_what_is_converted",
            "models/test_processor.py::test_files_that_would_be_read_first_are_refused",
        ],
        breaks=[
            Break(
                "processor: the older file goes first",
                "fastclip/models/processor.py",
                old='if whole.is_file() and (values := read_json(whole).get("image_processor")) is not None:',
                new='if not alone.is_file() and (values := read_json(whole).get("image_processor")) is not None:',
            ),
            Break(
                "processor: numbers are normalised all the same",
                "fastclip/models/processor.py",
                old='if not _flag(values, "do_normalize", where):',
                new="if False:",
            ),
            Break(
                "processor: numbers are from 0 to 1 all the same",
                "fastclip/models/processor.py",
                old='scale = float(f"{255 * factor:.12g}")',
                new="scale = 1.0",
            ),
            Break(
                "processor: ALIGN's numbers are not shifted",
                "fastclip/models/processor.py",
                old="tuple((shift + m) / scale for m in mean)",
                new="tuple(m / scale for m in mean)",
            ),
            Break(
                "processor: steps of others are passed over",
                "fastclip/models/processor.py",
                old='(name.startswith("do_") and name not in _STEPS)',
                new="False",
            ),
            Break(
                "processor: another size than the tower's",
                "fastclip/models/checkpoints/huggingface.py",
                old="if processor is not None and processor.image_size != image.image_size:",
                new="if False:",
            ),
            Break(
                "processor: transformers divides by the deviation twice",
                "fastclip/models/processor.py",
                old='values["include_top"] = False',
                new="pass",
            ),
            Break(
                "vocabulary: tokenizer.json is passed over",
                "fastclip/models/tokenizers/vocabulary.py",
                old="return VOCABULARY if same else tokenizer.name",
                new='return VOCABULARY if plain.is_file() else "bert-base-uncased"',
            ),
            Break(
                "vocabulary: words in the order of the file",
                "fastclip/models/tokenizers/vocabulary.py",
                old="return sorted(ids, key=ids.__getitem__)",
                new="return list(ids)",
            ),
            Break(
                "vocabulary: a tokenizer with capitals passes",
                "fastclip/models/tokenizers/vocabulary.py",
                old='_check({"type": None, **normaliser}, _NORMALISER, f"{file}: normalizer")',
                new="pass",
            ),
            Break(
                "convert: transformers reads another model's processor",
                "fastclip/models/checkpoints/writing.py",
                old="for name in (*_OF_MODELS, *read_first) if",
                new="for name in _OF_MODELS if",
            ),
        ],
    ),
    Promise(
        KEEP,
        "A model that `save_pretrained` wrote can be loaded again with its vocabulary; a modified model is refused",
        tests=[
            "models/test_saved.py::test_wrapped_and_tied_parameters_are_saved",
            "models/test_saved.py::test_changed_models_are_refused",
            "models/test_saved.py::test_vocabulary_is_kept_from_when_the_model_was_read",
            "models/test_saved.py::test_default_dtype_changes_no_weights",
        ],
        breaks=[
            Break(
                "saved: a compiled tower has other names",
                "fastclip/models/dual_encoder.py",
                old='name.replace(_COMPILED, "")',
                new="name",
            ),
            Break(
                "saved: a changed model is written",
                "fastclip/models/dual_encoder.py",
                old="if misfit := describe_misfit(expected, state, misshapen):",
                new="if misfit := []:",
            ),
            Break(
                "saved: without its vocabulary",
                "fastclip/models/tokenizers/vocabulary.py",
                old="if not isinstance(config.text_cfg, BertConfig) or config.folder is None:",
                new="if True:",
            ),
            Break(
                "saved: weights are rounded to the default dtype",
                "fastclip/models/dual_encoder.py",
                old="with torch.device(device), _default_dtype(torch.float32):",
                new="with torch.device(device):",
            ),
        ],
    ),
]
