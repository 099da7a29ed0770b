"""What `eval` refuses: text in which nothing counts, questions without the right columns, models that do not compare."""

from __future__ import annotations


def counted(tokens: int, rows: int) -> None:
    if not tokens:
        raise ValueError(
            f"no token of the {rows} measured row(s) counts: expected at least one token that has another before it "
            "and is no padding or prompt; measure longer texts, or with loss_on='all'."
        )
