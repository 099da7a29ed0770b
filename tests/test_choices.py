"""Multiple choice: the shapes of files, where choices begin, who wins, and what normalisation changes."""

from __future__ import annotations

import math
import pydoc_data.topics
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from alr_kernels.finetune import questions
from alr_kernels.finetune.choices import Answers, answer, encode, score
from alr_kernels.finetune.intervals import paired
from alr_kernels.finetune.questions import Question

SCIQ = {
    "question": "What is it?", "distractor1": "one", "distractor2": "two", "distractor3": "three",
    "correct_answer": "four", "support": " A text.",
}  # fmt: skip
PIQA = {"goal": "Open a door.", "sol1": "Push it.", "sol2": "Eat it.", "label": 1}
MEDMCQA = {"question": "Which?", "opa": "a1", "opb": "b1", "opc": "c1", "opd": "d1", "cop": 0}


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE with merges, of 400 tokens, which adds nothing of its own."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    built = tokenizers.ByteLevelBPETokenizer()
    text = "".join(list(pydoc_data.topics.topics.values())[:20])
    built.train_from_iterator([text], vocab_size=400, special_tokens=["<s>"], show_progress=False)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=built._tokenizer, bos_token="<s>", pad_token="<s>")


@pytest.fixture(scope="module")
def model():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlamaConfig(vocab_size=400, initializer_range=0.4, **sizes)
    return transformers.LlamaForCausalLM(config).eval()


class Letters:
    """A tokenizer of one token a character; a seam of ``joined`` characters is one token, as a BPE would merge it."""

    pad_token_id = bos_token_id = None

    def __init__(self, joined=()):
        self.joined = {pair: 300 + index for index, pair in enumerate(joined)}

    def encode(self, text, add_special_tokens=True):
        tokens, place = [], 0
        while place < len(text):
            pair = text[place : place + 2]
            tokens.append(self.joined.get(pair, ord(text[place])))
            place += 2 if pair in self.joined else 1
        return tokens


class Rigged(torch.nn.Module):
    """Gives each token a probability of its own, whatever came before."""

    def __init__(self, log_probabilities, size=310):
        super().__init__()
        rest = 1 - sum(math.exp(value) for value in log_probabilities.values())
        table = torch.full((size,), math.log(rest / (size - len(log_probabilities))), dtype=torch.float64)
        for token, value in log_probabilities.items():
            table[ord(token)] = value
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids, attention_mask=None):
        return SimpleNamespace(logits=self.table.expand(*input_ids.shape, -1))


def ask(model, asked, batch=4, max_length=100, tokenizer=None):
    return answer(model, tokenizer or Letters(), asked, max_length=max_length, batch=batch)


def parse(rows):
    return questions.parse([(f"f, line {number}", row) for number, row in enumerate(rows, 1)], "f")


def test_the_shape_of_sciq():
    shape, (found, bare) = parse([SCIQ, {**SCIQ, "support": None}])
    assert shape == "SciQ"
    assert found == Question("A text.\nQuestion: What is it?\nAnswer:", ("one", "two", "three", "four"), 3)
    assert bare.context == "\nQuestion: What is it?\nAnswer:", "as lm-eval's task has it"


def test_the_shape_of_piqa():
    assert parse([PIQA, {**PIQA, "label": "0"}]) == (
        "PIQA",
        [Question("Question: Open a door.\nAnswer:", ("Push it.", "Eat it."), right) for right in (1, 0)],
    )


@pytest.mark.parametrize(("values", "expected"), [((0, 3), (0, 3)), (("1", "4"), (0, 3)), (("b", "D"), (1, 3))])
def test_the_shape_of_medmcqa(values, expected):
    """From 0 as on the hub, from 1 as its authors count, or letters."""
    shape, found = parse([{**MEDMCQA, "cop": value} for value in values])
    assert shape == "MedMCQA"
    assert tuple(question.answer for question in found) == expected
    assert found[0].choices == ("A", "B", "C", "D")
    assert found[0].context == "Question: Which?\nChoices:\nA. a1\nB. b1\nC. c1\nD. d1\nAnswer:"


@pytest.mark.parametrize(
    ("choices", "given", "expected"),
    [
        (["x", "y", "z"], 2, 2),
        (["x", "y", "z"], 2.0, 2),
        (["x", "y", "z"], "2", 2),
        (["x", "y", "z"], "b", 1),
        (["x", "y", "z"], "z", 2),
        (["A", "B"], "B", 1),  # letter and text agree
        ([3, 5], 5, 1),  # no index, so the text
        (["x", "y", "y"], "y", 1),
        ('["x", "y"]', "1", 1),  # a cell of a CSV file
        (np.array(["x", "y"], dtype=object), 1, 1),  # of a Parquet file
    ],
)
def test_answers_of_the_general_shape(choices, given, expected):
    shape, (found,) = parse([{"question": "q", "choices": choices, "answer": given, "more": 1}])
    assert (shape, found.answer, found.context) == ("general", expected, "Question: q\nAnswer:")
    assert all(isinstance(choice, str) for choice in found.choices)


def test_normalisation_matters():
    """-3 for one character against -4 for four: the sum prefers the short choice, the mean the long one."""
    model = Rigged({"a": -3.0, "b": -1.0, " ": -2.0})
    found = ask(model, [Question("q", ("a", "bbbb"), 0), Question("q", ("a", "bbbb"), 1)])
    assert found.right.tolist() == [1, 0]
    assert found.right_norm.tolist() == [0, 1]
    assert found.as_dict() == {
        "questions": 2, "accuracy": 0.5, "accuracy_stderr": 0.125**0.5, "accuracy_norm": 0.5,
        "accuracy_norm_stderr": 0.125**0.5, "truncated": 0, "undefined": 0,
    }  # fmt: skip


def test_divided_by_characters_without_the_space_before():
    """-2 - 3 over 1 loses to -2 - 8 over 3: with the space it would be -5/2 against -10/4, a tie."""
    model = Rigged({" ": -2.0, "a": -3.0, "b": -8 / 3})
    found = ask(model, [Question("q", ("a", "bbb"), 1)])
    assert found.right_norm.tolist() == [1]


def test_a_tie_counts_in_part_wherever_the_right_choice_is():
    model = Rigged({"a": -3.0})
    for right in range(3):
        assert ask(model, [Question("q", ("x", "y", "z"), right)]).right.tolist() == [pytest.approx(1 / 3)]
    model = Rigged({"a": -30.0})
    assert ask(model, [Question("q", ("x", "x", "a"), 1)], batch=1).right.tolist() == [0.5], "the same text twice"


@pytest.mark.parametrize("batch", [1, 3, 50])
def test_likelihoods_against_a_loop_without_padding(model, tokenizer, batch):
    """Real tokens and a real model: the winner of each question, however it is cut into batches."""
    topics = list(pydoc_data.topics.topics.values())
    asked = [
        Question(f"Question: {text[: 40 + 9 * n]}\nAnswer:", tuple(text[k : k + 5 + k] for k in (50, 60, 75)), n % 3)
        for n, text in enumerate(topics[:8])
    ]
    expected, expected_norm = [], []
    for question in asked:
        context = tokenizer.encode(question.context)
        sums = []
        for choice in question.choices:
            tokens = tokenizer.encode(f"{question.context} {choice}")
            assert tokens[: len(context)] == context
            with torch.no_grad():
                logits = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
            sums.append(sum(float(logits[place - 1, tokens[place]]) for place in range(len(context), len(tokens))))
        expected.append(float(np.argmax(sums) == question.answer))
        norms = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        expected_norm.append(float(np.argmax(norms) == question.answer))
    found = answer(model, tokenizer, asked, max_length=200, batch=batch)
    assert found.right.tolist() == expected
    assert found.right_norm.tolist() == expected_norm
    assert 0 < sum(expected) < 8, "some right, some wrong"


def test_a_token_across_the_seam_is_scored_for_all_choices():
    """': ' merges: the question alone ends in ':', which no sequence has. All are scored from there."""
    plain = encode(Letters(), Question("q:", ("ab", "c"), 0), 50)
    assert (plain.sequences[0], plain.scored) == ([*map(ord, "q: ab")], [3, 2])
    merged = encode(Letters([": "]), Question("q:", ("ab", "c"), 0), 50)
    assert merged.sequences == [[ord("q"), 300, ord("a"), ord("b")], [ord("q"), 300, ord("c")]]
    assert merged.scored == [3, 2]


def test_a_seam_that_merges_for_one_choice_only_moves_for_all():
    class Seam(Letters):
        def encode(self, text, add_special_tokens=True):
            tokens = super().encode(text.replace(": a", "\x01"), add_special_tokens)
            return tokens

    found = encode(Seam(), Question("q:", ("ab", "c"), 0), 50)
    assert found.sequences == [[ord("q"), 1, ord("b")], [*map(ord, "q: c")]]
    assert found.scored == [2, 3], "both after 'q'"


def test_a_tokenizer_with_a_beginning_of_text(tokenizer):
    class Beginning:
        bos_token_id = pad_token_id = 0

        def encode(self, text, add_special_tokens=True):
            return ([0] if add_special_tokens else []) + tokenizer.encode(text) + ([9] if add_special_tokens else [])

    question = Question("Question: a\nAnswer:", ("b", "c"), 0)
    bare, begun = encode(tokenizer, question, 50), encode(Beginning(), question, 50)
    assert begun.sequences == [[0, *tokens] for tokens in bare.sequences], "and no end of text before a choice"
    assert begun.scored == bare.scored


def test_too_long_loses_its_beginning():
    found = encode(Letters(), Question("0123456789", ("ab", "c"), 0), 6)
    assert found.sequences == [[*map(ord, "789 ab")], [*map(ord, "6789 c")]]
    assert (found.scored, found.truncated) == ([3, 2], True)
    assert not encode(Letters(), Question("0123456789", ("ab", "c"), 0), 13).truncated
    assert ask(Rigged({"a": -1.0}), [Question("0123456789", ("a", "c"), 0)] * 2, max_length=5).truncated == 2


def test_nan_counts_as_wrong_and_is_told():
    model = Rigged({"a": -1.0})
    model.table.data[ord("b")] = math.nan
    found = ask(model, [Question("q", ("a", "c"), 0), Question("q", ("b", "c"), 0)])
    assert (found.right.tolist(), found.undefined) == ([0.0, 0.0], 2)  # logits with a NaN make all likelihoods NaN
    assert score(np.array([-1.0, -math.inf]), 0) == 1.0


def test_the_binomial_standard_error():
    found = Answers(np.array([1.0, 0, 0, 0]), np.ones(4)).as_dict()
    assert found["accuracy_stderr"] == pytest.approx((0.25 * 0.75 / 4) ** 0.5)
    assert found["accuracy_norm_stderr"] == 0


def test_the_interval_is_paired_seeded_and_holds_the_truth():
    generator = np.random.default_rng(0)
    level = generator.normal(0, 100, 400)  # rows differ much more than models do
    before, after = level, level + generator.normal(0.5, 1, 400)
    weights = generator.integers(1, 20, 400).astype(float)
    found = paired([((after - before) * weights, weights)], seed=4)
    assert found == paired([((after - before) * weights, weights)], seed=4)
    assert found != paired([((after - before) * weights, weights)], seed=5)
    assert found.low < found.value < found.high
    assert found.low < 0.5 < found.high
    assert 0.15 < found.high - found.low < 0.35, "4 × 1/√400, wider by the weights; unpaired it would be 20"
    assert (-found).as_dict() == {"value": -found.value, "low": -found.high, "high": -found.low}


def test_intervals_of_the_mean_cover_as_often_as_they_say():
    """Of 200 samples about 190 intervals hold the truth (standard deviation 3; bootstraps are a bit short)."""
    generator = np.random.default_rng(1)
    held = 0
    for seed in range(200):
        found = paired([(generator.normal(0, 1, 60), np.ones(60))], seed=seed)
        held += found.low <= 0 <= found.high
    assert 178 <= held <= 199


def test_intervals_over_files_and_rows_that_weigh_nothing():
    ones = np.ones(50)
    found = paired([(np.full(50, 2.0), ones), (np.full(50, 4.0), ones)])
    assert (found.value, found.low, found.high) == (3.0, 3.0, 3.0), "files weigh alike"
    weights = np.arange(1.0, 51.0)
    found = paired([(3 * weights, weights)])
    assert (found.low, found.high) == pytest.approx((3.0, 3.0)), "a row brings its weight along"
    found = paired([(np.array([1.0, 0.0, 1.0]), np.array([1.0, 0.0, 1.0]))])
    assert (found.value, found.low, found.high) == (1.0, 1.0, 1.0)
    assert paired([(np.array([1.0]), np.array([2.0]))]).as_dict() == {"value": 0.5, "low": None, "high": None}
    assert paired([(np.array([math.nan, 1.0]), np.ones(2))]).as_dict()["value"] is None
