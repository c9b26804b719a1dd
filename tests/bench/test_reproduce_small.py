"""`make reproduce-small`, every part end to end on tiny models and a few made-up sentences."""

import functools
import json
import random

import pytest
import reproduce_decoder
import reproduce_encoder
import reproduce_peers
import reproduce_small
import reproduce_tuning

from mezo.config import Config
from tests.tiny_data import BAD, GOOD, write_jsonl
from tests.tiny_models import save, tokenizer

POOLS = {"train": 24, "dev": 16, "test": 12}
SHOTS = {6: {"k_shot": 6, "num_dev": 8}, 8: {"k_shot": 8, "num_dev": 8}}


def ratings():
    """Sentences of known words, all different, rated by their last one."""
    rng = random.Random(0)
    words = tokenizer().get_vocab()
    plain = sorted(word for word in words if word.isalpha() and word not in (*GOOD, *BAD))
    made = {" ".join((*rng.sample(plain, 4), rng.choice((BAD, GOOD)[i % 2]))): (-2.0, 2.0)[i % 2] for i in range(120)}
    return list(made.items())


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Every part of the command, on tiny models, few sentences and few steps."""
    llama, bert = (save(family, tmp_path_factory.mktemp(family)) for family in ("llama", "bert"))

    def config(prompt, steps, output_dir):
        own = {"target_modules": ("q_proj", "o_proj"), "layers_to_transform": (2,), "objective": "cross_entropy"}
        words = {"prompt": "{text} It was", "label_words": (" terrible", " great"), "train_file": "replaced"}
        return Config.of(model=llama, output_dir=str(output_dir), steps=steps, batch_size=4, lr=1e-3, **own, **words)

    sample = reproduce_decoder.Sample(config, ratings, POOLS, (13, 21), SHOTS, num_test=8)
    study = {**reproduce_decoder.STUDY, "steps": 20, "num_train": 16, "num_dev": 8, "num_test": 8, "eval_every": 10}
    own = {"model": lambda: bert, "steps": {6: 6, 8: 6}, "peer": {"steps": 4, "lr": 1e-3, "eval_every": 2}}
    own["options"] = {**reproduce_encoder.MEZO, "layers_to_transform": (1, 2)}
    rows = {
        f"{split}_file": write_jsonl(tmp_path_factory.mktemp("rows") / f"{split}.jsonl", 16, seed)
        for seed, split in enumerate(POOLS)
    }
    demo = config("it-was", 1, "unused").replace(**rows)
    few = {"k_shot": 6, "num_dev": 8, "num_test": 8}
    return {
        "linear": reproduce_small.PARTS["linear"],
        "decoder": functools.partial(reproduce_decoder.few_shot, sample=sample, steps=6),
        "accuracy objective": functools.partial(reproduce_decoder.accuracy_study, sample=sample, study=study),
        "encoder": functools.partial(reproduce_encoder.encoder, sample=sample, **own),
        "peers": functools.partial(reproduce_peers.peers, config=demo, epochs=6, lrs=(3e-3, 3e-2)),
        "tuning": functools.partial(reproduce_tuning.tuning, sample=sample, shots=few, steps=10),
    }


@pytest.fixture
def measured(parts, tmp_path, monkeypatch):
    """Runs the command for a part; what is in the file afterwards. Probes without the slow fits of large C."""
    monkeypatch.setattr(reproduce_encoder, "STRENGTHS", (0.01, 1.0))

    def run(part):
        path = tmp_path / "out.json"
        assert reproduce_small.main(["--output", str(path), "--parts", part], parts) == 0
        return json.loads(path.read_text())

    return run


def test_every_part_can_be_small(parts):
    assert parts.keys() == reproduce_small.PARTS.keys()


def test_the_decoder_has_a_mean_and_std_for_each_number_of_shots(measured):
    found = measured("decoder")["decoder"]
    assert list(found["shots"]) == ["6", "8"]
    after = found["shots"]["8"]["accuracy after"]
    assert len(after["values"]) == 2
    assert after["mean"] == pytest.approx(sum(after["values"]) / 2)


def test_the_study_counts_zero_differences_and_keeps_four_curves(measured):
    found = measured("accuracy objective")["accuracy objective"]
    assert len(found["zero_differences"]) == 9
    assert all(0 <= row["zero_share"] <= 1 for row in found["zero_differences"])
    curves = found["learning"]["curves"]
    assert curves["step"] == [20]
    assert curves["dev_step"] == [0, 10, 20]
    assert 0 <= curves["training_accuracy"][0] <= 1


def test_the_encoder_is_beside_its_peers(measured):
    found = measured("encoder")["encoder"]
    for shots in found["shots"].values():
        assert set(shots) == {"probe", "adamw", "mezo", "mezo from a probe"}
        assert all(len(row["accuracy"]["values"]) == 2 for row in shots.values())


def test_an_adapter_a_prefix_and_all_weights_are_beside_each_other(measured):
    found = measured("tuning")["tuning"]["tunings"]
    assert found["prefix"]["parameters"] < found["lora"]["parameters"] < found["full"]["parameters"]
    for row in found.values():
        assert 0 <= row["best_step"] <= 10
        assert row["peak_bytes"] is None or row["peak_bytes"] >= 0  # None where the kernel keeps no account
        assert row["first_difference_of_replay"] is None


def test_what_a_newcomer_knows_learns_the_same_rows(measured):
    """Words alone say how these sentences are rated; AdamW lowers the loss of the adapter that MeZO trains."""
    found = measured("peers")["peers"]
    assert found["tf-idf"]["accuracy"] > 0.8
    best, tried = found["adamw"]["best"], found["adamw"]["tried"]
    assert best["dev"]["loss"] == min(row["dev"]["loss"] for row in tried) < tried[0]["dev"]["loss"]
    assert len(tried) == 12


def test_parts_are_kept_beside_each_other(measured, tmp_path):
    (tmp_path / "out.json").write_text(json.dumps({"another": {"seconds": 1}}))
    assert measured("linear")["another"] == {"seconds": 1}
