"""Zero-shot classification and robustness."""

from __future__ import annotations

from broken import DATA, EVALUATION, STOPS, Break, Promise

PROMISES = [
    Promise(
        EVALUATION,
        "Zero-shot acc1, acc5 and mean_per_class_recall equal those of CLIP_benchmark and scikit-learn",
        tests=[
            "evaluation/test_zero_shot.py::test_metrics_are_clip_benchmarks",
            "evaluation/test_zero_shot.py::test_metrics_are_scikit_learns",
        ],
        breaks=[
            Break(
                "zero-shot: classes without pictures count",
                "fastclip/evaluation/classification.py",
                old="recalls = hits[pictures > 0].double() / pictures[pictures > 0]",
                new="recalls = hits.double() / pictures.clamp(min=1)",
            ),
            Break(
                "zero-shot: acc5 is of four",
                "fastclip/evaluation/classification.py",
                old="recall(ranks, 5)",
                new="recall(ranks, 4)",
            ),
            Break(
                "zero-shot: the first template only",
                "fastclip/evaluation/classification.py",
                old="F.normalize(features.mean(dim=1), dim=-1)",
                new="F.normalize(features[:, 0], dim=-1)",
            ),
            Break(
                "zero-shot: rows of the confusion are predictions",
                "fastclip/evaluation/classification.py",
                old="(labels * classes + predictions)",
                new="(predictions * classes + labels)",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "`--details` lists the accuracy of every class, and the class with which it is confused most often",
        tests=[
            "evaluation/test_zero_shot.py::test_details_tell_what_a_class_is_taken_for",
            "evaluation/test_zero_shot.py::test_details_of_many_classes_need_no_matrix_of_them",
        ],
        breaks=[
            Break(
                "details: the least confused",
                "fastclip/evaluation/classification.py",
                old="descending=True",
                new="descending=False",
            ),
            Break(
                "details: a class and what it is taken for change places",
                "fastclip/evaluation/classification.py",
                old="torch.stack([labels, predictions], dim=1)",
                new="torch.stack([predictions, labels], dim=1)",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Of several zero-shot classes with the same name, the first one is predicted, as argmax does",
        tests=[
            "evaluation/test_zero_shot.py::test_classes_of_one_name_are_an_argmaxs",
        ],
        breaks=[
            Break(
                "zero-shot: both namesakes are hits",
                "fastclip/evaluation/classification.py",
                old="return ranks + _earlier(namesakes, labels)",
                new="return ranks",
            ),
        ],
    ),
    Promise(
        STOPS,
        "An interrupted `fastclip eval zeroshot` resumes to the same result, and leaves no temporary files",
        tests=[
            "evaluation/test_zero_shot.py::test_command_goes_on_after_a_stop",
            "evaluation/test_zero_shot.py::test_command_writes_clip_benchmarks_json",
            "evaluation/test_zero_shot.py::test_other_classes_are_not_taken_from_a_stopped_run",
        ],
        breaks=[
            Break(
                "zero-shot: nothing is kept",
                "fastclip/evaluation/zero_shot.py",
                old="source, batch_size=batch_size, workers=workers, store=store",
                new="source, batch_size=batch_size, workers=workers",
            ),
            Break(
                "zero-shot: what is kept stays",
                "fastclip/cli/evaluate/__init__.py",
                old="store.clear()",
                new="pass",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Prompt templates are CLIP's or those of a file, and each has one placeholder for the class name",
        tests=[
            "evaluation/test_zero_shot.py::test_templates_are_open_clips_or_of_a_file",
        ],
        breaks=[
            Break(
                "zero-shot: templates without a place",
                "fastclip/data/classes/prompts.py",
                old='template.count("{}") != 1',
                new='template.count("{}") > 1',
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "The prompt templates of the dataset are used if it has any, and otherwise CLIP's 80 templates",
        tests=[
            "evaluation/test_zero_shot.py::test_templates_are_the_sources_where_it_has_some",
        ],
        breaks=[
            Break(
                "zero-shot: a plain template of the data gives way",
                "fastclip/evaluation/zero_shot.py",
                old="if name is None and source.templates:",
                new="if name is None and len(source.templates) > 1:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Class folders are read as in torchvision, and ImageNet's classes get CLIP's names",
        tests=[
            "data/test_classes.py::test_folder_is_torchvisions",
            "data/test_classes.py::test_numbers_are_classes_by_number",
            "data/test_classes.py::test_wordnet_ids_get_clips_names_in_order",
            "data/test_classes.py::test_folder_that_is_not_in_order_is_refused",
        ],
        breaks=[
            Break(
                "class folders: numbers sorted as text",
                "fastclip/data/sources/classes.py",
                old="places = imagenet.folder_places(name)",
                new="places = {folder: place for place, folder in enumerate(sorted(imagenet.folder_places(name)))}",
            ),
            Break(
                "class folders: underscores stay",
                "fastclip/data/sources/classes.py",
                old='folder.replace("_", " ")',
                new="folder",
            ),
            Break(
                "class folders: splits are classes",
                "fastclip/data/sources/classes.py",
                old="if set(names) <= SPLITS:",
                new="if False:",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "ImageNet-R and ImageNet-A are classified among their own 200 classes; the folder of another dataset "
        "is refused",
        tests=[
            "evaluation/test_robustness.py::test_every_set_is_classified_among_its_own_classes",
            "data/test_classes.py::test_subsets_have_their_200_classes",
            "evaluation/test_robustness.py::test_folder_of_another_set_is_refused",
        ],
        breaks=[
            Break(
                "robustness: -R as ImageNet",
                "fastclip/evaluation/robustness.py",
                old="_check_set(name, source)",
                new="pass",
            ),
            Break(
                "robustness: -R among all classes",
                "fastclip/evaluation/robustness.py",
                old='DataSet("ImageNet-R", "imagenet-r"',
                new='DataSet("ImageNet-R", "imagenet"',
            ),
            Break(
                "robustness: -A has -R's classes",
                "fastclip/data/classes/imagenet.py",
                old='"imagenet-a": "imagenet_a_indices.txt"',
                new='"imagenet-a": "imagenet_r_indices.txt"',
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "The means of a model and of published models are taken over the same datasets",
        tests=[
            "evaluation/test_robustness.py::test_means_are_over_the_same_sets_for_all",
        ],
        breaks=[
            Break(
                "robustness: a mean over what there is",
                "fastclip/evaluation/robustness.py",
                old="if any(name in known for known in ZERO_SHOT.values())] or shifted",
                new="] or shifted",
            ),
        ],
    ),
    Promise(
        EVALUATION,
        "Class names in a file are matched by name, in any order, and names without a match are reported",
        tests=[
            "data/test_classes.py::test_class_names_of_a_file_go_by_name",
            "data/test_classes.py::test_class_names_of_classes_that_have_names",
            "data/test_classes.py::test_class_names_of_numbers_and_wordnet_ids_go_in_their_order",
        ],
        breaks=[
            Break(
                "class names: folders' by position",
                "fastclip/data/classes/names.py",
                old="    places = _by_name(keys, classes)",
                new="    places = list(range(len(own)))",
            ),
            Break(
                "class names: others' by position",
                "fastclip/data/spec.py",
                old="source.class_names = tuple(given[place] for place in places)",
                new="source.class_names = tuple(given)",
            ),
            Break(
                "class names: an order that names contradict",
                "fastclip/data/classes/names.py",
                old="if order is None or any(named not in (None, place) for named, place in zip(places, order)):",
                new="if order is None:",
            ),
        ],
    ),
    Promise(
        DATA,
        "Shards of CLIP_benchmark provide their classes and templates, unless others are given",
        tests=[
            "data/test_classes.py::test_shards_are_clip_benchmarks",
        ],
        breaks=[
            Break(
                "class shards: names that are given are lost",
                "fastclip/data/spec.py",
                old="class_names=names or ()",
                new="class_names=()",
            ),
            Break(
                "class shards: a label beyond the names",
                "fastclip/data/shards/source.py",
                old="and int(text) < len(self.class_names)):",
                new="):",
            ),
        ],
    ),
]
