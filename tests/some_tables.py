"""Tables that the tests of reading and copying share."""

import numpy as np
import pandas as pd
from hypothesis import strategies as st

HOSTILE = [
    '</script><img src=x onerror="alert(1)">',
    "=cmd|'/c calc'!A1",
    "\u202eright to left\u2066",
    "x" * 10_000,
    'he said "no", twice',
    "two\nlines",
    "  blanks  ",
    "naïve – Ω – 名前",
]


TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=12)


def write(path, text, encoding="utf-8"):
    path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return path


def cells(table):
    """All cells as Python values, None where missing."""
    frame = table.frame
    return {
        name: [None if pd.isna(value) else value for value in frame[name].tolist()]
        for name in frame.columns
    }


def frames():
    return pd.DataFrame(
        {
            "n": [1, 2, 3],
            "f": [0.1, np.nan, 1e300],
            "t": ["a", None, "é"],
            "d": pd.to_datetime(["2024-01-31 00:00", None, "2024-02-01 10:30"]),
            "c": pd.Categorical(["u", "v", "u"]),
            "b": [True, False, True],
            "y": ["no", "no", "yes"],
        }
    )
