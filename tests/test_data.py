"""What of a row is learnt, and that nothing of it is lost or learnt twice."""

from __future__ import annotations

import pytest
from data_cases import CHATML, FORGETFUL, NONE_HELD, PAIRS, PLAIN, TEXTS, chat, loaded, numbered, said, tokenizer
from hypothesis import given
from hypothesis import strategies as st

from alr_kernels.finetune.data import Collator
from alr_kernels.finetune.data.packing import IGNORED
from alr_kernels.finetune.data.tokens import Document, Encoder

TOKENS = tokenizer(adds="<s> $A")


@pytest.mark.parametrize(
    ("adds", "expected"),
    [("", "{}</s>"), ("<s> $A", "<s>{}</s>"), ("<s> $A </s>", "<s>{}</s>")],
)
def test_a_text_begins_and_ends_once(adds, expected):
    """Whatever the tokenizer adds by itself, and whatever the text has already."""
    tokens = tokenizer(adds=adds)
    written_out = expected.format("two")
    found = loaded(
        {"a.jsonl": [{"text": "one"}, {"text": written_out}]}, "a.jsonl", tokens, {"packing": False}, **NONE_HELD
    )
    texts = [tokens.decode(ids) for ids in found.train["input_ids"]]
    assert texts == [expected.format("one"), written_out]
    for ids, labels in zip(found.train["input_ids"], found.train["labels"], strict=True):
        assert labels == [IGNORED, *ids[1:]]


def test_a_tokenizer_without_an_end_of_text_adds_none():
    tokens = tokenizer(eos=False)
    found = loaded({"a.jsonl": numbered(3)}, "a.jsonl", tokens, {"packing": False}, **NONE_HELD)
    assert [said(tokens, row)[0] for row in found.train] == [row["text"] for row in numbered(3)]


@pytest.mark.parametrize("length", [7, 32, 100_000])
def test_packed_texts_lose_nothing(length):
    tokens = tokenizer(adds="<s> $A")
    found = loaded({"a.jsonl": TEXTS}, "a.jsonl", tokens, {"max_length": length}, **NONE_HELD)
    ids = [token for row in found.train["input_ids"] for token in row]
    assert tokens.decode(ids) == "".join(f"<s>{row['text']}</s>" for row in TEXTS)
    sizes = [len(row) for row in found.train["input_ids"]]
    assert set(sizes[:-2]) <= {length}
    assert max(sizes) <= length
    assert found.facts["train_tokens"] == len(ids)
    assert found.facts["packed"]


def test_long_texts_are_cut_into_consecutive_windows():
    tokens = tokenizer()
    found = loaded({"a.jsonl": TEXTS}, "a.jsonl", tokens, {"packing": False, "max_length": 50}, **NONE_HELD)
    parts = iter(found.train["input_ids"])
    for row in TEXTS:
        whole = [*tokens(row["text"])["input_ids"], tokens.eos_token_id]
        joined: list[int] = []
        while len(joined) < len(whole):
            joined += next(parts)
        assert joined == whole
    assert next(parts, None) is None
    assert not found.facts["packed"]


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
@pytest.mark.parametrize("packing", [False, True])
def test_only_completions_count(adds, packing):
    tokens = tokenizer(adds=adds)
    found = loaded({"a.jsonl": PAIRS}, "a.jsonl", tokens, {"packing": packing, "max_length": 200}, **NONE_HELD)
    begin = "<s>" if adds else ""
    texts, learnt = zip(*(said(tokens, row) for row in found.train), strict=True)
    assert "".join(texts) == "".join(f"{begin}{row['prompt']}{row['completion']}</s>" for row in PAIRS)
    assert "".join(learnt) == "".join(f"{row['completion']}</s>" for row in PAIRS)
    assert len(texts) == (-(-found.facts["train_tokens"] // 200) if packing else 40)
    assert found.facts["format"] == "prompt/completion"


def test_a_prompt_is_not_parted_from_its_completion():
    tokens = tokenizer()
    found = loaded({"a.jsonl": PAIRS}, "a.jsonl", tokens, {"packing": True, "max_length": 20}, **NONE_HELD)
    assert all(said(tokens, row)[0].startswith(("0", *"123456789")) for row in found.train)
    assert all(said(tokens, row)[0].endswith("</s>") for row in found.train)
    assert len(found.train) < 40


@given(
    prompt=st.text(st.characters(codec="utf-8", exclude_characters="<\0"), max_size=12),
    completion=st.text(st.characters(codec="utf-8", exclude_characters="<\0"), min_size=1, max_size=12),
)
def test_no_token_of_a_completion_is_left_out(prompt, completion):
    """A token that spans the seam counts; nothing that is left out of the loss has anything of the completion."""
    if not completion.strip():
        return
    encoder = Encoder(TOKENS, "prompt/completion", "answers", lambda *_: "here")
    ((ids, labels),) = encoder([Document(prompt, completion, True, 0, 0)])
    assert TOKENS.decode(ids) == f"<s>{prompt}{completion}</s>"
    learnt = [label for label in labels if label != IGNORED]
    assert learnt == ids[len(ids) - len(learnt) :]
    left_out = TOKENS.decode(ids[: len(ids) - len(learnt)]).rstrip("\ufffd")  # of a character that spans the seam
    assert f"<s>{prompt}".startswith(left_out)
    assert len(ids) - len(learnt) <= len(TOKENS(prompt)["input_ids"])


def test_all_tokens_count_when_asked():
    tokens = tokenizer()
    found = loaded({"a.jsonl": PAIRS}, "a.jsonl", tokens, {"loss_on": "all"}, **NONE_HELD)
    assert all(row["labels"] == [IGNORED, *row["input_ids"][1:]] for row in found.train)
    assert found.facts["loss_tokens"] == found.facts["train_tokens"] - 40


TURNS = chat("hello", "good day", "and now?", "fare\nwell")


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize(
    ("template", "learnt"),
    [
        (CHATML, "good day<|im_end|>\nfare\nwell<|im_end|>\n"),
        (PLAIN, "good day\nfare\nwell\n</s>"),  # nothing marks the end there: the end of text is added
    ],
)
def test_only_what_the_assistant_says_counts(template, learnt, packing):
    tokens = tokenizer(template, adds="<s> $A")
    found = loaded({"a.jsonl": [TURNS]}, "a.jsonl", tokens, {"packing": packing, "max_length": 200}, **NONE_HELD)
    text, counted = said(tokens, found.train[0])
    whole = tokens.apply_chat_template(TURNS["messages"], tokenize=False)
    assert text == whole + ("</s>" if template == PLAIN else "")  # and no <s>, which the template does not write
    assert counted == learnt
    everything = loaded({"a.jsonl": [TURNS]}, "a.jsonl", tokens, {"loss_on": "all", "max_length": 200}, **NONE_HELD)
    assert everything.train[0]["labels"] == [IGNORED, *found.train[0]["input_ids"][1:]]


def test_other_ways_to_write_conversations():
    tokens = tokenizer(CHATML)
    roles = {"user": "human", "assistant": "gpt"}
    other = [{"from": roles[turn["role"]], "value": turn["content"]} for turn in TURNS["messages"]]
    alone = {"messages": [{"role": "assistant", "content": "I speak first"}, *TURNS["messages"]]}
    found = loaded(
        {"a.jsonl": [{"conversations": other}, {"conversations": alone["messages"]}]},
        *("a.jsonl", tokens, {"max_length": 200}), **NONE_HELD,
    )  # fmt: skip
    one, two = (said(tokens, row)[1] for row in found.train)
    assert one == "good day<|im_end|>\nfare\nwell<|im_end|>\n"
    assert two.endswith("I speak first<|im_end|>\n" + one)


def test_a_template_that_rewrites_serves_conversations_that_it_does_not_rewrite():
    """One that drops old thoughts only rewrites when more follows, and all tokens can be learnt in any case."""
    tokens = tokenizer(FORGETFUL)
    found = loaded({"a.jsonl": [chat("hello", "good day")]}, "a.jsonl", tokens, {"max_length": 200}, **NONE_HELD)
    assert said(tokens, found.train[0])[1] == "<think></think>good day<|im_end|>\n"
    loaded({"a.jsonl": [TURNS]}, "a.jsonl", tokens, {"loss_on": "all"}, **NONE_HELD)


def test_rows_that_are_too_long_are_cut_and_counted():
    tokens = tokenizer()
    rows_ = [
        {"prompt": "short", "completion": " yes"},
        {"prompt": "short", "completion": " yes " * 30},
        {"prompt": "a long prompt " * 30, "completion": " no"},
        {"prompt": "no answer", "completion": " "},
    ]
    found = loaded({"a.jsonl": rows_}, "a.jsonl", tokens, **NONE_HELD)
    assert (found.facts["truncated"], found.facts["dropped"], found.facts["rows"]) == (2, 2, 3)
    assert [len(ids) for ids in found.train["input_ids"]][1:] == [32]
    assert said(tokens, found.train[1])[1].startswith(" yes  yes")


@pytest.mark.parametrize(
    ("names", "columns", "text"),
    [
        (("prompt", "completion"), None, "ab</s>"),
        (("question", "answer"), None, "a\nb</s>"),
        (("Question", "Answer"), None, "a\nb</s>"),
        (("instruction", "output"), None, "a\nb</s>"),
        (("instruction", "response"), None, "a\nb</s>"),
        (("input", "target"), None, "a\nb</s>"),
        (("prompt", "response"), None, "a\nb</s>"),
        (("x", "y"), "prompt=x,completion=y", "a\nb</s>"),
        (("instruction", "input", "output"), None, "a\n\nb\nc</s>"),
        (("x", "y", "z"), "completion=z, prompt=x+y", "a\n\nb\nc</s>"),
        (("text", "other"), None, "a</s>"),
        (("content", "other"), None, "a</s>"),
        (("text", "body"), "text=body", "b</s>"),
        (("prompt", "completion"), "text=completion", "b</s>"),
    ],
)
def test_columns_tell_the_format(names, columns, text):
    tokens = tokenizer()
    row = dict(zip(names, "abc", strict=False))
    found = loaded(
        {"a.jsonl": [row, row | {names[0]: ""}]}, "a.jsonl", tokens, {"packing": False}, columns=columns, **NONE_HELD
    )
    assert said(tokens, found.train[0])[0] == text


def test_white_space_at_the_seam_is_enough():
    tokens = tokenizer()
    rows_ = [{"question": "a ", "answer": "b"}, {"question": "a", "answer": "\tb"}, {"question": "", "answer": "b"}]
    found = loaded({"a.jsonl": rows_}, "a.jsonl", tokens, {"loss_on": "all"}, **NONE_HELD)
    assert [said(tokens, row)[0] for row in found.train] == ["a b</s>", "a\tb</s>", "b</s>"]
    learnt = loaded({"a.jsonl": [{"question": "a", "answer": "b"}]}, "a.jsonl", tokens, **NONE_HELD)
    assert said(tokens, learnt.train[0])[1] == "b</s>"  # the line break belongs to the question


def test_facts_count_what_a_loss_counts():
    tokens = tokenizer(CHATML)
    for content in (TEXTS, PAIRS, [chat(f"hello {i}", "good day", "so?", "yes") for i in range(9)]):
        found = loaded({"a.jsonl": content}, "a.jsonl", tokens, {"max_length": 24}, held_out=0.2)
        for side, name in ((found.train, ""), (found.held_out, "held_out_")):
            shifted = sum(label != IGNORED for labels in side["labels"] for label in labels[1:])
            assert found.facts[f"{name}loss_tokens"] == shifted
            assert all(any(label != IGNORED for label in labels[1:]) for labels in side["labels"])
            assert all(len(row["input_ids"]) == len(row["labels"]) <= 24 for row in side)
        assert found.facts["train_sequences"] == len(found.train)
        assert found.facts["held_out_tokens"] == sum(map(len, found.held_out["input_ids"]))


def test_progress_is_told():
    told = []
    loaded({"a.jsonl": numbered(20)}, "a.jsonl", how={"progress": lambda *what: told.append(what)}, held_out=0.5)
    assert told == [("reading", 20), ("tokenising", 10), ("tokenising", 10)]


def test_padding_is_masked_and_never_counts():
    """Also where the end of text is what pads: the end of a text counts, padding does not."""
    tokens = tokenizer()
    found = loaded({"a.jsonl": PAIRS[:3]}, "a.jsonl", tokens, **NONE_HELD)
    batch = Collator(tokens)(list(found.train))
    lengths = [len(ids) for ids in found.train["input_ids"]]
    assert batch["input_ids"].shape == batch["labels"].shape == (3, -(-max(lengths) // 8) * 8)
    assert batch["attention_mask"].sum(1).tolist() == lengths
    for row, length, ids, mask, labels in zip(found.train, lengths, *batch.values(), strict=True):
        assert ids.tolist()[:length] == row["input_ids"]
        assert labels.tolist()[:length] == row["labels"]
        assert labels[length - 1] == tokens.eos_token_id
        assert set(ids.tolist()[length:]) <= {tokens.eos_token_id}
        assert set(labels.tolist()[length:]) <= {IGNORED}
        assert not mask[length:].any()
    assert Collator(tokens, 1)(list(found.train))["input_ids"].shape[1] == max(lengths)
    assert Collator(tokens, 64, limit=20)(list(found.train))["input_ids"].shape[1] == 20
    assert Collator(tokenizer(pad_token="<s>"))(list(found.train))["input_ids"][0, -1] == 0
