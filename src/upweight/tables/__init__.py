"""Tables of any kind: from a file to numbers, with a word on what was made of every column."""

from upweight.tables.columns import Column, Kind, plan_columns, row_names
from upweight.tables.copying import copy_rows
from upweight.tables.features import Features, prepare
from upweight.tables.reading import Source, Table, TableError, read_table
from upweight.tables.target import Target, Task, read_target

__all__ = [
    "Column",
    "Features",
    "Kind",
    "Source",
    "Table",
    "TableError",
    "Target",
    "Task",
    "copy_rows",
    "plan_columns",
    "prepare",
    "read_table",
    "read_target",
    "row_names",
]
