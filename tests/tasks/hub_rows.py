"""One row of each task's data set, with the fields, types and label values that it has on the hub; texts are ours."""

LED = "Ann Lee sang in Oslo.\n@highlight\nLee sang for an hour\n@highlight\nOslo was cold"
SPANS = {"text": ["Ann Lee", "Oslo", "Lee"], "start": [0, 16, 34], "end": [7, 20, 37]}

HUB = {
    "sst2": ("stanfordnlp/sst2",),
    "sst5": ("SetFit/sst5",),
    "mr": ("cornell-movie-review-data/rotten_tomatoes",),
    "cr": ("SetFit/CR",),
    "mpqa": ("jxm/mpqa",),
    "subj": ("SetFit/subj",),
    "trec": ("SetFit/TREC-QC",),
    "snli": ("stanfordnlp/snli",),
    "mnli": ("nyu-mll/glue", "mnli"),
    "rte": ("aps/super_glue", "rte"),
    "cb": ("aps/super_glue", "cb"),
    "boolq": ("google/boolq",),
    "wsc": ("aps/super_glue", "wsc.fixed"),
    "wic": ("aps/super_glue", "wic"),
    "multirc": ("aps/super_glue", "multirc"),
    "copa": ("aps/super_glue", "copa"),
    "record": ("aps/super_glue", "record"),
    "squad": ("rajpurkar/squad",),
    "drop": ("ucinlp/drop",),
}
"""What `datasets.load_dataset` is called with."""

ROWS = {
    "sst2": {"idx": 0, "sentence": "a dull film . ", "label": 0},
    "sst5": {"text": "a fine film .", "label": 3, "label_text": "positive"},
    "mr": {"text": "a fine film .", "label": 1},
    "cr": {"text": "the zoom is great .", "label": 1, "label_text": "positive"},
    "mpqa": {"sentence": "strongly criticised", "label": 0},
    "subj": {"text": "a warm , funny tale .", "label": 1, "label_text": "subjective"},
    "trec": {
        "text": "Who wrote Hamlet ?",
        "label": 3,
        "label_text": "an individual",
        "label_original": "HUM:ind",
        "label_coarse": 3,
        "label_coarse_text": "human beings",
        "label_coarse_original": "HUM",
    },
    "snli": {"premise": "Two dogs run.", "hypothesis": "The dogs sleep.", "label": 2},
    "mnli": {"premise": "Is it far?", "hypothesis": "It may be far.", "label": 1, "idx": 5},
    "rte": {"premise": "Oslo is cold.", "hypothesis": "Oslo is warm.", "idx": 0, "label": 1},
    "cb": {"premise": "B: Do you think it rained?", "hypothesis": "it rained", "idx": 0, "label": 2},
    "boolq": {"question": "is ice cold", "answer": True, "passage": "Ice is cold."},
    "wsc": {
        "text": "Mark told Pete lies. He was wrong.",
        "span1_index": 0,
        "span2_index": 4,
        "span1_text": "Mark",
        "span2_text": "He",
        "idx": 0,
        "label": 1,
    },
    "wic": {
        "word": "place",
        "sentence1": "Do you want to come over to my place?",
        "sentence2": "A political system with no place for them.",
        "start1": 31,
        "start2": 27,
        "end1": 36,
        "end2": 32,
        "idx": 0,
        "label": 0,
    },
    "multirc": {
        "paragraph": "Ann went out. She saw Bo.",
        "question": "Who did Ann see?",
        "answer": "Bo",
        "idx": {"paragraph": 0, "question": 0, "answer": 0},
        "label": 1,
    },
    "copa": {
        "premise": "My body cast a shadow over the grass.",
        "choice1": "The sun was rising.",
        "choice2": "I cut the grass.",
        "question": "cause",
        "idx": 0,
        "label": 0,
    },
    "record": {
        "passage": LED,
        "query": "Fans of @placeholder queued.",
        "entities": ["Oslo", "Lee", "Ann Lee"],
        "entity_spans": SPANS,
        "answers": ["Ann Lee", "Lee"],
        "idx": {"passage": 0, "query": 0},
    },
    "squad": {
        "id": "5733be28",
        "title": "Ice_and_snow",
        "context": "Ice is cold. Snow is white.",
        "question": " What is cold?",
        "answers": {"text": ["Ice", "Ice is"], "answer_start": [0, 0]},
    },
    "drop": {
        "section_id": "nfl_1",
        "query_id": "f37e81fa",
        "passage": "The Bears kicked two goals, then one.",
        "question": "How many goals?",
        "answers_spans": {"spans": ["3", "three"], "types": ["number", "span"]},
    },
}
UNLABELLED = {
    "record": {**ROWS["record"], "answers": []},
    "squad": {**ROWS["squad"], "answers": {"text": [], "answer_start": []}},
    "drop": {**ROWS["drop"], "answers_spans": {"spans": [], "types": []}},
    **{name: {**row, "label": -1} for name, row in ROWS.items() if "label" in row and name != "trec"},
}
"""The same rows as an official test set has them, without an answer (TREC has no such rows)."""
TEST_SPLIT = {"mnli": "validation_matched", **dict.fromkeys(("sst5", "mr", "cr", "mpqa", "subj", "trec"), "test")}
"""The hub's name of the split that is tested on, where it is not "validation"."""
