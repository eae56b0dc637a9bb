"""
Audit a table
=============

A table of wines with mistakes in it: labels that were mixed up, numbers typed with the point in the
wrong place, rows that were entered twice. We look for them as one would in a table of one's own,
without clean rows to compare with and without choosing a model, and then train without what was
found.
"""

# %%
# A table with mistakes
# ---------------------
# Cultivars get names, some cells are left empty, and the mistakes go in. They are kept to see
# afterwards what was found; the audit does not know them.

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from sklearn.datasets import load_wine

import upweight as uw
from upweight.auditing.cleaning import clean
from upweight.auditing.verifying import verify
from upweight.report import audit_plots as plots

wine = load_wine(as_frame=True)
table = wine.data.rename(columns={"od280/od315_of_diluted_wines": "od280_od315"})
names = np.array(["barolo", "grignolino", "barbera"])
table["cultivar"] = names[wine.target]

rng = np.random.default_rng(2)
rows = rng.permutation(len(table))
mislabelled, wrong_unit, copied = rows[:12], rows[12:17], rows[17:20]
wrong = (wine.target[mislabelled] + rng.integers(1, 3, len(mislabelled))) % 3
table.loc[mislabelled, "cultivar"] = names[wrong]
table.loc[wrong_unit, "alcohol"] /= 10  # a decimal point in the wrong place
table.loc[rng.permutation(len(table))[:15], "magnesium"] = np.nan
table = pd.concat([table, table.loc[copied]], ignore_index=True)

folder = Path(tempfile.mkdtemp())
table.to_csv(folder / "wine.csv", index=False)
print(*(folder / "wine.csv").read_text().splitlines()[:3], sep="\n")

# %%
# The audit
# ---------
# It takes the file and the name of the column that the others should explain. With ``out`` it
# writes a run folder with a report, as ``upweight audit wine.csv --target cultivar`` does.

audit = uw.audit(folder / "wine.csv", "cultivar", out=folder / "run", progress=False)
print(f"{audit.summary.flagged} of {audit.summary.judged} labels are suspected")
print("findings:", dict(audit.summary.counts))
print("written:", sorted(path.name for path in (folder / "run").iterdir()))

# %%
# What was made of the columns comes first in every reading: a column that was misunderstood spoils
# the rest. ``kinds={"magnesium": "category"}`` would override it.

pd.DataFrame(audit.columns).head(6)

# %%
# Suspected labels
# ----------------
# The suspicion of a row is 1 minus the probability that models which have not seen the row give to
# its label. Rows above a threshold, for which another label is more probable, have a flag.

suspects = audit.suspects()
suspects[["row", "suspicion", "given", "proposed"]].head(15)

# %%
# The threshold comes from faults that the audit itself has planted into the table, and so does the
# share of the flagged rows that it expects to be wrong. Here we can look it up.

truly = suspects["row"].isin(mislabelled)
expected, low, high = audit.summary.precision
print(f"expected to be wrong: {expected:.0%} of the flagged ({low:.0%} to {high:.0%})")
print(f"truly wrong:          {truly.mean():.0%}")
print(f"found:                {truly.sum()} of {len(mislabelled)} wrong labels")

# %%
# Most rows have a suspicion near 0. Where the two colours meet, a look at the row decides.

figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
plots.plot_suspicion(audit.rows["suspicion"], suspects["row"], ax=left)
ax = plots.plot_given_and_proposed(suspects["given"], suspects["proposed"], ax=right)

# %%
# Why?
# ----
# Every finding has a sentence of evidence. A wrong label and a wrong number are different findings,
# from different evidence: models of the label for the one, the other columns of the row for the
# other.

for kind in ("label", "features", "duplicate"):
    found = audit.findings[audit.findings["kind"] == kind]
    for line in found.head(2).itertuples():
        print(f"row {line.row}, {kind}: {line.evidence}")

# %%
# All three kinds beside what was put in:

for kind, planted in {
    "label": mislabelled,
    "features": wrong_unit,
    "duplicate": range(len(table) - len(copied), len(table)),
}.items():
    found = audit.findings.loc[audit.findings["kind"] == kind, "row"]
    print(f"{kind}: {found.isin(planted).sum()} of {len(planted)} found, {len(found)} listed")

# %%
# A clean table
# -------------
# `clean` writes the file again without the rows that were found. What stays is copied as it is,
# byte for byte. ``relabel=True`` would keep suspected rows and give them the proposed label.

done = clean(audit, folder / "wine.clean.csv", drop="label-errors,features,duplicates")
print(f"{done.kept} rows kept, {done.dropped} dropped")
original, cleaned = (
    (folder / name).read_text().splitlines() for name in ("wine.csv", "wine.clean.csv")
)
print("lines that were not there before:", len(set(cleaned) - set(original)))

# %%
# Does it help?
# -------------
# `verify` holds out a quarter of the rows, again and again, and trains with all other rows, without
# the flagged ones and without as many random ones. The model is none of those that have judged the
# rows. Held-out rows keep their wrong labels, so even a perfect model cannot be right on all.

checked = verify(audit, repeats=10, model="linear", progress=False)
print(checked.held_out)
for name, (gain, low, high) in {
    "without the flagged rows": checked.gain,
    "beside random rows": checked.gain_over_random,
}.items():
    print(f"{checked.metric}, {name}: {gain:+.3f} ({low:+.3f} to {high:+.3f})")
ax = plots.plot_verification(checked, ax=plt.subplots(layout="constrained")[1])

# %%
# An interval that holds 0 says that this table is too small to tell whether leaving the rows out
# helps this model. It does not say that the labels are right.
