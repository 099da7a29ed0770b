"""Checks on data that users bring: which file and row, what was expected, what was got; see ``_validate.py``."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ._validate import choice, count, number, seed

if TYPE_CHECKING:
    from .finetune.data.source import Source

FORMS = 'a "text" column, or "prompt" and "completion", or "messages" (docs/data.md lists the names that are known)'


def source(given: Source) -> None:
    if not isinstance(given.source, str) or not given.source.strip():
        raise ValueError(
            f"{given.option}: expected a file, a folder, a pattern or a hub data set's id, got {given.source!r}"
        )
    number(given.flag("held-out"), given.held_out, high=1.0, closed=True)
    if given.max_rows is not None:
        count(given.flag("max-rows"), given.max_rows)
    seed(given.seed)


def how(max_length: Any, loss_on: Any) -> None:
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 4:
        raise ValueError(f"--max-length: expected an integer ≥ 4, got {max_length!r}")
    choice("--loss-on", loss_on, ("answers", "all"))


def library() -> None:
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise ImportError("data: reading them needs datasets: pip install 'alr-kernels[train]'.") from None


def padding(tokenizer: Any) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError(
            "tokenizer: expected a token to pad with, got one that has neither a pad token nor an end-of-text token; "
            "set tokenizer.pad_token to one of its tokens and save it (padding is masked and never in the loss)."
        )
    return int(pad)


def lengths(multiple: Any, limit: Any) -> None:
    count("multiple", multiple)
    if limit is not None:
        count("limit", limit)


def no_such_file(given: Source) -> NoReturn:
    raise FileNotFoundError(
        f"{given.option}: there is no file or folder {given.source!r} (looked from {Path.cwd()}); check the path."
    )


def matched(given: Source, names: Sequence[str]) -> None:
    if not names:
        raise FileNotFoundError(
            f"{given.option}: no file matches the pattern {given.source!r} (looked from {Path.cwd()}); ** stands for "
            "any folders, * for any name."
        )


def hub_options_unused(given: Source) -> None:
    named = {"split": given.split != "train", "subset": given.subset is not None}
    for option, is_set in named.items():
        if is_set:
            raise ValueError(
                f"{given.flag(option)}: it has no effect, for {given.source!r} is no data set of the hub; leave it out."
            )


def folder(given: Source, texts: Sequence[Path], tables: Sequence[Path], endings: Sequence[str]) -> None:
    if not texts and not tables:
        found = f"found only {', '.join(endings[:5])}" if endings else "it is empty"
        raise ValueError(
            f"{given.option}: no data in the folder {given.source!r}: expected files that end in .txt, .md, .rst, "
            f".jsonl, .json, .csv, .tsv or .parquet, {found}; other text is read by a pattern, such as "
            f"'{given.source}/**/*.py'."
        )
    if texts and tables:
        raise ValueError(
            f"{given.option}: the folder {given.source!r} has text ({texts[0]}, {len(texts)} in all) and tables "
            f"({tables[0]}, {len(tables)} in all), expected one sort; name one by a pattern, such as "
            f"'{given.source}/**/*{tables[0].suffix}'."
        )


def not_empty(name: str, alone: bool) -> None:
    if alone:
        raise ValueError(f"{name}: the file is empty; expected text, or rows with {FORMS}.")


def some_rows(given: Source, rows: int, blank: int) -> None:
    if not rows:
        what = f"all of its {blank} rows are blank" if blank else "it has no rows"
        raise ValueError(f"{given.option}: nothing to read in {given.source!r}: {what}; expected text, or {FORMS}.")


def encoding(name: str, line: int, position: int, byte: int) -> NoReturn:
    raise ValueError(
        f"{name}: expected UTF-8 text, got byte 0x{byte:02x} at position {position} (line {line}); convert the file "
        "(iconv -f latin1 -t utf-8, say, or -f utf-16), or leave it out if it is no text."
    )


def not_json(name: str, line: int, error: Any) -> NoReturn:
    raise ValueError(
        f"{name}, line {line} is not JSON ({error.msg}, column {error.colno}); each line must be one object, such "
        'as {"text": "..."} (a .json file may hold one array of objects instead).'
    ) from None


def too_deep(place: str) -> NoReturn:
    raise ValueError(f"{place}: the JSON is nested too deeply to be read; expected an object with {FORMS}.") from None


def long_number(place: str, error: ValueError) -> NoReturn:
    raise ValueError(f"{place}: a number of the JSON cannot be read ({_line(error)}); write it as text.") from None


def json_object(place: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f'{place}: expected a JSON object, got {_what(value)}; write {{"text": ...}}, say.')
    return value


def not_csv(place: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"{place}: expected a CSV record, got {error}; a field with a quote, a delimiter or a line break goes into "
        "double quotes, and quotes inside it are doubled."
    ) from None


def csv_fields(place: str, got: int, expected: int) -> None:
    if got != expected:
        raise ValueError(
            f"{place}: expected {expected} fields, as the header has, got {got}; put fields with delimiters or line "
            "breaks into double quotes."
        )


def csv_header(place: str, names: Sequence[str]) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{place}: expected a header with distinct names, got {twice[0]!r} twice; rename one.")


def not_parquet(name: str, error: Exception) -> NoReturn:
    raise ValueError(f"{name}: expected a whole Parquet file, got one that cannot be read ({_line(error)}).") from None


def not_loaded(given: Source, split: str, error: Exception) -> NoReturn:
    subset = f", subset {given.subset!r}" if given.subset else ""
    raise ValueError(
        f"{given.option}: there is no file or folder {given.source!r} here, and as a data set of the Hugging Face hub "
        f"(split {split!r}{subset}) it could not be loaded: {_line(error)}; check the name, {given.flag('split')} and "
        f"{given.flag('subset')}, and the connection."
    ) from error


def split_there(given: Source, split: str, splits: Sequence[str]) -> None:
    if split not in splits:
        raise ValueError(
            f"{given.flag('split')}: {given.source!r} has no split {split!r}; it has {', '.join(map(repr, splits))}."
        )


def column_item(flag: str, given: str, well_formed: bool) -> None:
    if not well_formed:
        raise ValueError(
            f"{flag}: expected text=COLUMN, prompt=COLUMN,completion=COLUMN or messages=COLUMN (COLUMN+COLUMN joins "
            f"two of text), got {given!r}"
        )


def column_set(flag: str, given: str, known: bool) -> None:
    if not known:
        raise ValueError(f"{flag}: expected text, or prompt and completion, or messages, once each, got {given!r}")


def columns_there(name: str, wanted: Sequence[str], there: Sequence[str], flag: str) -> None:
    for column in wanted:
        if column not in there:
            raise ValueError(f"{flag}: {name} has no column {column!r}; it has {_names(there)}.")


def columns_unused(flag: str, given: str | None, name: str) -> None:
    if given is not None:
        raise ValueError(f"{flag}: it has no effect on {name}, which is text without columns; leave it out.")


def not_preferences(name: str, columns: Sequence[str], preferred: bool, flag: str) -> None:
    if preferred:
        raise ValueError(
            f"{name}: these are preferences (columns {_names(columns)}), which need another loss than the next token's "
            f"(DPO, say); to learn the chosen answers alone: {flag} prompt=prompt,completion=chosen where they are "
            f"text, {flag} messages=chosen where they are conversations."
        )


def one_format(name: str, columns: Sequence[str], fits: Sequence[tuple[str, Sequence[str]]], flag: str) -> None:
    if not fits:
        raise ValueError(
            f"{name}: expected {FORMS}; it has the columns {_names(columns)}. Say which holds what: {flag} "
            "text=COLUMN, or prompt=COLUMN,completion=COLUMN, or messages=COLUMN."
        )
    if len(fits) > 1:
        ways = " or ".join(f"{kind} ({', '.join(used)})" for kind, used in fits)
        raise ValueError(
            f"{name}: its columns can be read in more than one way, as {ways}; say which: {flag} text=COLUMN, or "
            "prompt=COLUMN,completion=COLUMN, or messages=COLUMN."
        )


def same_format(first: str, expected: str, name: str, got: str) -> None:
    if got != expected:
        raise ValueError(f"{name}: expected {expected}, as in {first}, got {got}; put one format into a folder.")


def cell(record: dict[str, Any], column: str, place: str) -> Any:
    if column not in record:
        raise ValueError(f"{place}: expected a column {column!r}, as in the first row; it has {_names(list(record))}.")
    return record[column]


def string(value: Any, place: str) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{place}: expected a string, got {_what(value)}; write it as text, or remove the row.")
    return value


def encodable(text: str, place: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place}: expected text, got half a character ({text[error.start]!r}, a lone surrogate); write the "
            "character itself or both halves of its escape."
        ) from None


def conversation(value: Any, place: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise TypeError(
            f'{place}: expected a list of messages, such as [{{"role": "user", "content": "..."}}, ...], got '
            f"{_what(value)}."
        )
    return value


def message(found: dict[str, Any], place: str) -> None:
    role, content = found.get("role"), found.get("content")
    calls_a_tool = content is None and "tool_calls" in found
    if not isinstance(role, str) or not (isinstance(content, str) or calls_a_tool):
        raise TypeError(
            f'{place}: expected "role" and "content" as strings, got role {_what(role)} and content {_what(content)} '
            f"(keys {_names(list(found))})."
        )


def chat_template(tokenizer: Any) -> None:
    if not tokenizer.chat_template:
        raise ValueError(
            "the data are conversations, and the tokenizer has no chat template to write them with; name a file that "
            "has one: --chat-template FILE, or a tokenizer that has one: --tokenizer."
        )


def template_refuses(place: str, error: Exception) -> NoReturn:
    raise ValueError(
        f"{place}: the tokenizer's chat template does not take this conversation ({_line(error)}); change the row, or "
        "the template (--chat-template FILE)."
    ) from error


def opens(text: str, beginning: str, place: str, turn: int) -> None:
    if not text.startswith(beginning):
        at = next((i for i, (a, b) in enumerate(zip(text, beginning, strict=False)) if a != b), len(text))
        raise ValueError(
            f"{place}: what the assistant says in message {turn} cannot be told from the rest, for the chat template "
            f"writes what comes before the end of it in another way when more follows: {beginning[at : at + 30]!r} "
            f"became {text[at : at + 30]!r}. Learn from all tokens (--loss-on all), or use a template that only adds "
            "(--chat-template FILE)."
        )


def wanted(given: Source, train: bool) -> None:
    if given.held_out_data is None and not train and not given.held_out:
        raise ValueError(
            f"{given.option}: nothing of {given.source!r} is held out to measure on; expected {given.flag('held-out')} "
            f"> 0 or {given.flag('held-out-data')}."
        )
    if given.held_out_data is None and train and given.held_out == 1:
        raise ValueError(
            f"{given.flag('held-out')}: expected a share below 1, got {given.held_out}, which leaves nothing of "
            f"{given.source!r} to train on."
        )


def two_contents(given: Source, unit: str, rows: int, differ: bool) -> None:
    if not differ:
        what = "only one" if rows == 1 else f"{rows} times the same"
        raise ValueError(
            f"{given.option}: no {unit} of {given.source!r} can be held out to measure on, for it has {what}; name "
            f"other data for that ({given.flag('held-out-data')}), or add rows (a JSONL file has one on each line; in "
            "one text file blank lines part them)."
        )


def not_all_known(given: Source, any_left: bool) -> None:
    if not any_left:
        raise ValueError(
            f"{given.option}: nothing of {given.source!r} is left to train on, for {given.held_out_data!r} has all of "
            f"its rows; name other data to measure on ({given.flag('held-out-data')}), or leave it out and let a "
            "share be drawn."
        )


def something_to_learn(given: Source, sequences: int, why: str) -> None:
    if not sequences:
        raise ValueError(f"{given.option}: nothing to train on in {given.source!r}: {why}; {_TOO_SHORT}")


def something_to_measure(given: Source, sequences: int, why: str) -> None:
    if not sequences:
        named = given.held_out_data or given.source
        raise ValueError(
            f"{given.option}: nothing to measure on in what is held out of {named!r}: {why}; hold out more "
            f" ({given.flag('held-out')}), name other data for that ({given.flag('held-out-data')}), or "
            f"{_TOO_SHORT}"
        )


_TOO_SHORT = (
    "raise --max-length where prompts fill all of it, add answers (of conversations only what the assistant says is "
    "learnt), or learn from all tokens (--loss-on all)."
)


def not_written(path: Path | None, error: OSError) -> NoReturn:
    if error.errno != errno.ENOSPC:
        raise error
    raise OSError(errno.ENOSPC, "No space left on the device (TMPDIR names another folder)", str(path)) from error


def _line(error: Exception) -> str:
    """Return the first line of another library's message."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]


def _what(value: Any) -> str:
    said = "null" if value is None else f"{type(value).__name__} {value!r}"
    return said if len(said) <= 80 else said[:77] + "..."


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:12]) or "none"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
