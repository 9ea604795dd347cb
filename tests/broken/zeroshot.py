"""Zero-shot classification and robustness."""

from __future__ import annotations

from broken import Break, Promise

ZERO_SHOT = "evaluation/test_zero_shot.py"
CLASSES = "data/test_classes.py"
ROBUSTNESS = "evaluation/test_robustness.py"

# fmt: off
PROMISES: dict[str, list[Promise]] = {
    "Zero-shot classification and robustness": [
        Promise(
            "zero-shot acc1, acc5 and mean_per_class_recall equal CLIP_benchmark's and scikit-learn's",
            (f"{ZERO_SHOT}::test_metrics_are_clip_benchmarks", f"{ZERO_SHOT}::test_metrics_are_scikit_learns"),
            (
                Break("zero-shot: classes without pictures count", "fastclip/evaluation/classification.py", "recalls = hits[pictures > 0].double() / pictures[pictures > 0]", "recalls = hits.double() / pictures.clamp(min=1)"),
                Break("zero-shot: acc5 is of four", "fastclip/evaluation/classification.py", "recall(ranks, 5)", "recall(ranks, 4)"),
                Break("zero-shot: the first template only", "fastclip/evaluation/classification.py", "F.normalize(features.mean(dim=1), dim=-1)", "F.normalize(features[:, 0], dim=-1)"),
                Break("zero-shot: rows of the confusion are predictions", "fastclip/evaluation/classification.py", "(labels * classes + predictions)", "(predictions * classes + labels)"),
            ),
        ),
        Promise(
            "details tell of every class its accuracy and what it is taken for most, of any number of classes",
            (f"{ZERO_SHOT}::test_details_tell_what_a_class_is_taken_for", f"{ZERO_SHOT}::test_details_of_many_classes_need_no_matrix_of_them"),
            (
                Break("details: the least confused", "fastclip/evaluation/zero_shot.py", "descending=True", "descending=False"),
                Break("details: a class and what it is taken for change places", "fastclip/evaluation/zero_shot.py", "torch.stack([found.labels, found.predictions], 1)", "torch.stack([found.predictions, found.labels], 1)"),
            ),
        ),
        Promise("zero-shot classes of one name are told apart as by an argmax", (f"{ZERO_SHOT}::test_classes_of_one_name_are_an_argmaxs",), (Break("zero-shot: both namesakes are hits", "fastclip/evaluation/classification.py", "return ranks + ((same >= 0) & (same < labels[:, None])).sum(1)", "return ranks"),)),
        Promise(
            "an interrupted evaluation goes on to the same result, and leaves nothing behind",
            (f"{ZERO_SHOT}::test_command_goes_on_after_a_stop", f"{ZERO_SHOT}::test_command_writes_clip_benchmarks_json", f"{ZERO_SHOT}::test_other_classes_are_not_taken_from_a_stopped_run"),
            (
                Break("zero-shot: nothing is kept", "fastclip/evaluation/zero_shot.py", "source, batch_size=batch_size, workers=workers, store=store", "source, batch_size=batch_size, workers=workers"),
                Break("zero-shot: what is kept stays", "fastclip/cli/evaluate/zeroshot.py", "        store.clear()", "        pass"),
            ),
        ),
        Promise("prompt templates are CLIP's, or a file's, each with one place for the name", (f"{ZERO_SHOT}::test_templates_are_open_clips_or_of_a_file",), (Break("zero-shot: templates without a place", "fastclip/data/prompts.py", 'template.count("{}") != 1', 'template.count("{}") > 1'),)),
        Promise("the data's own templates count, whatever they are, and CLIP's 80 where there are none", (f"{ZERO_SHOT}::test_templates_are_the_sources_where_it_has_some",), (Break("zero-shot: a plain template of the data gives way", "fastclip/evaluation/zero_shot.py", "if name is None and source.templates:", "if name is None and len(source.templates) > 1:"),)),
        Promise(
            "class folders are torchvision's, ImageNet's classes by WordNet id or number, with CLIP's names in order",
            (f"{CLASSES}::test_folder_is_torchvisions", f"{CLASSES}::test_numbers_are_classes_by_number", f"{CLASSES}::test_wordnet_ids_get_clips_names_in_order", f"{CLASSES}::test_folder_that_is_not_in_order_is_refused"),
            (
                Break("class folders: numbers sorted as text", "fastclip/data/classes.py", "    places = imagenet.folder_places(name)\n", "    places = {folder: place for place, folder in enumerate(sorted(imagenet.folder_places(name)))}\n"),
                Break("class folders: underscores stay", "fastclip/data/classes.py", 'folder.replace("_", " ")', "folder"),
                Break("class folders: splits are classes", "fastclip/data/classes.py", "if set(names) <= SPLITS:", "if False:"),
            ),
        ),
        Promise("ImageNet-R and -A are classified among their own 200 classes, and a folder of another set is refused", (f"{ROBUSTNESS}::test_every_set_is_classified_among_its_own_classes", f"{CLASSES}::test_subsets_have_their_200_classes", f"{ROBUSTNESS}::test_folder_of_another_set_is_refused"), (Break("robustness: -R as ImageNet", "fastclip/evaluation/robustness.py", "        _check_set(name, source)", "        pass"), Break("robustness: -R among all classes", "fastclip/evaluation/robustness.py", 'DataSet("ImageNet-R", "imagenet-r"', 'DataSet("ImageNet-R", "imagenet"'), Break("robustness: -A has -R's classes", "fastclip/data/imagenet.py", '"imagenet-a": "imagenet_a_indices.txt"', '"imagenet-a": "imagenet_r_indices.txt"'))),
        Promise("a model and the published ones are compared over the same sets", (f"{ROBUSTNESS}::test_means_are_over_the_same_sets_for_all",), (Break("robustness: a mean over what there is", "fastclip/evaluation/robustness.py", "if any(name in known for known in ZERO_SHOT.values())] or shifted", "] or shifted"),)),
        Promise("shards of CLIP_benchmark have its classes and templates, or those that are named", (f"{CLASSES}::test_shards_are_clip_benchmarks",), (Break("class shards: names that are given are lost", "fastclip/data/classes.py", "class_names=names or ()", "class_names=()"), Break("class shards: a label beyond the names", "fastclip/data/shards.py", "if not text.isdigit() or int(text) >= len(self.class_names):", "if not text.isdigit():"),)),
    ],
}
# fmt: on
