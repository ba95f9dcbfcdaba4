"""BM25 and TF-IDF of texts and of token ids, against their formulas word by word."""

import math
import sys

import numpy as np
import pytest
import torch
from dattri_baselines.bm25 import BM25
from dattri_baselines.documents import WORDS, read_documents
from dattri_baselines.tf_idf import TfIdf
from torch import nn
from torch.utils.data import DataLoader

import dattri_core as dattri

TEXTS = [
    "The cat sat on the mat.",
    "A dog sat; the dog barked!",
    "Cats and dogs",
    "It rained on the mat, on the cat, on me",
    "?",
]
QUERIES = ["the cat, the mat", "A dog barked at nothing known", "!", "zebra", "rained on on cat"]
LIBRARIES = {"bm25": "bm25s", "tf-idf": "sklearn"}
MADE = {"bm25": BM25, "tf-idf": TfIdf}


@pytest.fixture
def task():
    return dattri.Task(nn.Linear(3, 2))


@pytest.fixture(params=LIBRARIES)
def name(request):
    pytest.importorskip(LIBRARIES[request.param])
    return request.param


def words(text):
    return "".join(c if c.isalnum() else " " for c in text.lower()).split()


def bm25_oracle(texts, queries, k1=1.5, b=0.75):
    n, mean = len(texts), sum(map(len, texts)) / len(texts)
    scores = np.zeros((n, len(queries)))
    for i, text in enumerate(texts):
        for j, query in enumerate(queries):
            for word in query:
                having = sum(word in other for other in texts)
                if word in text:
                    idf = math.log(1 + (n - having + 0.5) / (having + 0.5))
                    count = text.count(word)
                    scores[i, j] += idf * count / (count + k1 * (1 - b + b * len(text) / mean))
    return scores


def tf_idf_oracle(texts, queries):
    n, vocabulary = len(texts), sorted({word for text in texts for word in text})

    def vector(text):
        made = [
            text.count(w) * (1 + math.log((1 + n) / (1 + sum(w in other for other in texts))))
            for w in vocabulary
        ]
        size = math.sqrt(sum(x * x for x in made))
        return np.array(made) / size if size else np.array(made)

    return np.array([[vector(text) @ vector(query) for query in queries] for text in texts])


ORACLES = {"bm25": bm25_oracle, "tf-idf": tf_idf_oracle}


def test_scores_are_those_of_the_formula(name, task):
    got = dattri.attribute(task, TEXTS, QUERIES, method=name)
    want = ORACLES[name]([words(t) for t in TEXTS], [words(q) for q in QUERIES])
    assert got.shape == (5, 5)
    assert np.abs(got.values.numpy() - want).max() < 1e-12
    assert (got.values[:, 2:4] == 0).all()  # no word, or none that is known
    assert want.max() > 0.5


def test_bm25_has_its_two_numbers(task):
    pytest.importorskip("bm25s")
    texts, queries = ([words(t) for t in side] for side in (TEXTS, QUERIES))
    for k1, b in ((0.3, 0.0), (3.0, 1.0)):
        got = dattri.attribute(task, TEXTS, QUERIES, method="bm25", k1=k1, b=b).values
        assert np.abs(got.numpy() - bm25_oracle(texts, queries, k1, b)).max() < 1e-12


def test_token_ids_are_words(name, task):
    generator = torch.Generator().manual_seed(0)
    train, test = (torch.randint(9, (n, 6), generator=generator) for n in (12, 5))
    test[0, 0] = 77  # in no train text
    want = ORACLES[name](
        [list(map(str, r)) for r in train.tolist()], [list(map(str, r)) for r in test.tolist()]
    )
    labels = torch.zeros(12), torch.zeros(5)
    for sides in (
        (train, test),
        ((train, labels[0]), (test, labels[1])),
        ({"input_ids": train}, {"input_ids": test, "labels": test}),
        (DataLoader(list(train), batch_size=5), DataLoader(list(test), batch_size=2)),
    ):
        got = dattri.attribute(task, *sides, method=name).values
        assert np.abs(got.numpy() - want).max() < 1e-12


def test_padding_is_left_out(name, task):
    ids = torch.tensor([[4, 5, 6, 0], [5, 5, 0, 0], [6, 4, 5, 5]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    texts = [["4", "5", "6"], ["5", "5"], ["6", "4", "5", "5"]]
    got = dattri.attribute(task, batch, batch, method=name).values
    assert np.abs(got.numpy() - ORACLES[name](texts, texts)).max() < 1e-12


def test_pairs_and_mappings_of_texts_are_read(name, task):
    want = dattri.attribute(task, TEXTS, QUERIES, method=name).values
    pairs = [(text, 0) for text in TEXTS]
    keyed = [{"text": text, "label": 1} for text in QUERIES]
    assert torch.equal(dattri.attribute(task, pairs, keyed, method=name).values, want)


def test_nothing_to_index_scores_zero(name, task):
    got = dattri.attribute(task, ["?", "!"], ["word", ""], method=name).values
    assert torch.equal(got, torch.zeros(2, 2, dtype=torch.float64))


def test_the_size_of_the_work_does_not_show(name, task, monkeypatch, tmp_path):
    want = dattri.attribute(task, TEXTS, QUERIES, method=name)
    monkeypatch.setattr("dattri_baselines.written.WORK", 11)
    assert torch.equal(dattri.attribute(task, TEXTS, QUERIES, method=name).values, want.values)
    dattri.attribute(task, TEXTS, QUERIES, method=name, out=tmp_path / "s")
    stored = dattri.Scores.load(tmp_path / "s")
    assert np.array_equal(stored.values, want.values.numpy())
    assert stored.provenance["method"] == want.provenance["method"]
    assert stored.provenance["method"]["name"] == name


def test_words_are_what_the_pattern_says(name, task):
    got = dattri.attribute(task, ["ab", "ba"], ["ab"], method=name, words="a").values
    assert got[0, 0] == got[1, 0] > 0


def test_a_dry_run_reads_nothing(name, task):
    assert "5 x 5" in dattri.attribute(task, TEXTS, QUERIES, method=name, dry_run=True)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_named_with_its_extra(name, task, monkeypatch):
    for module in [m for m in sys.modules if m.split(".")[0] == LIBRARIES[name]]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, LIBRARIES[name], None)
    with pytest.raises(dattri.SpecError, match=r"pip install dattri-core\[text\]"):
        MADE[name]().attribute(task, TEXTS, QUERIES)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (torch.zeros(3, 2), r"torch.float32 of shape \(3, 2\)"),
        ((torch.zeros(3, dtype=torch.long), torch.zeros(3)), r"torch.int64 of shape \(3,\)"),
        ({"pixels": torch.zeros(3, 2)}, "a NoneType"),
    ],
)
def test_what_is_no_text_is_refused(data, got):
    examples = dattri.Examples.of(data, "train")
    with pytest.raises(dattri.SpecError, match=f"train data: got {got}"):
        read_documents(examples, WORDS)
