"""Metadata of passages: typed columns beside their texts, and the expressions over these that filter a search.

    date, kind      of every file: the day it was changed, and its suffix without the dot
    front matter    of Markdown, in YAML
    rows            the other columns of a file of rows
    --meta k=v      of a whole run

The last one that names a column wins. A column is of the kind of its first value: text, a number (float64), a truth
value, a date, a time (UTC) or a list of texts. Columns are added as files bring new names. A value that does not fit
its column is left out and reported. Names are in lower case, letters, digits and `_`; one that is a column of the
store's own gets a `_` behind it.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

from gemify.io.rows import replace_surrogates

Value = str | float | bool | date | datetime | list[str]

TEXT_COLUMNS = ("file", "text", "title", "heading", "place")
OWN_COLUMNS = frozenset([*TEXT_COLUMNS, "version", "words", "ordinal", "vector", "id"])
"""Columns of the store that are not metadata."""
MAX_FILTER_CHARACTERS = 1000  # deeper nesting overflows the stack of LanceDB's planner, which ends the process
_MAX_COLUMNS = 200
_MAX_CHARACTERS = 1000  # of a value: longer texts are none
_FUNCTIONS = frozenset(
    """
    and any array_contains array_has array_has_all array_has_any array_length between btrim cast char_length
    coalesce contains current_date date date_part date_trunc double ends_with ilike in int length like
    lower not now or regexp_like regexp_match starts_with substr timestamp to_date to_timestamp trim try_cast upper
    varchar
    """.split()  # noqa: SIM905
)
"""What may stand before a parenthesis: others, such as `repeat`, can take any amount of memory."""
_QUOTED = re.compile(r"'(?:[^']|'')*'")
_NOT_EXPRESSIONS = re.compile(r"--|/\*|[;?$@#']")  # comments, further statements, parameters, an open quote
_CALL = re.compile(r"""([\w"`\])]+)\s*\(""")


def column_name(key: Any) -> str:
    """Return the column of a key, "" if it has no letter or digit."""
    name = re.sub(r"\W+", "_", str(key).lower()).strip("_")[:100]
    if name[:1].isdigit():
        name = f"n{name}"
    return f"{name}_" if name in OWN_COLUMNS else name


def to_metadata(given: Mapping[Any, Any]) -> dict[str, Value]:
    """Return what of a mapping can be metadata, by column: short texts, numbers, truth values, times,lists."""
    found: dict[str, Value] = {}
    for key, value in given.items():
        with contextlib.suppress(ValueError, OverflowError):  # numbers and times beyond those of a column
            if (name := column_name(key)) and (read := _to_value(name, value)) is not None:
                found[name] = read
    return found


def parse_metadata(pairs: Iterable[str]) -> dict[str, Value]:
    """Read ``key=value`` pairs. A value is a number, true, false, a date as 2025-03-01, or else text.

    Raises:
        ValueError: A pair has no ``=``, or a key without a letter.
    """
    found: dict[str, Value] = {}
    for pair in pairs:
        key, is_pair, text = pair.partition("=")
        if not (is_pair and column_name(key) and text.strip()):
            raise ValueError(f"metadata must be KEY=VALUE, got {pair!r}: write --meta lang=de")
        read: Any = text.strip()
        if re.fullmatch(r"-?\d+(\.\d+)?|true|false", read):
            read = read == "true" if read in ("true", "false") else float(read)
        elif (day := _day(read)) is not None:
            read = day
        found |= to_metadata({key: read})
    return found


def file_metadata(kind: str, mtime: float) -> dict[str, Value]:
    """Return what every file has: the day (UTC) it was changed, and its kind."""
    return {"date": datetime.fromtimestamp(mtime, UTC).date(), "kind": kind.removeprefix(".")}


def _to_value(name: str, value: Any) -> Value | None:
    if name == "date" and not isinstance(value, list | bool | int | float):
        return _day(value)
    match value:
        case bool():
            return value
        case int() | float():
            return float(value) if math.isfinite(value) else None
        case datetime():
            return value.astimezone(UTC).replace(tzinfo=None) if value.tzinfo else value
        case date():
            return value
        case str() if value.strip() and len(value) <= _MAX_CHARACTERS:
            return replace_surrogates(value.strip())
        case list() if value and all(isinstance(item, str | int | date) for item in value):
            listed = [replace_surrogates(str(item)) for item in value]
            return listed if sum(map(len, listed)) <= _MAX_CHARACTERS else None
    return None


def _day(value: Any) -> date | None:
    if isinstance(value, datetime):
        return value.date()
    if isinstance(value, date):
        return value
    with contextlib.suppress(ValueError):
        if re.match(r"\s*\d{4}-\d\d-\d\d", str(value)):
            return datetime.fromisoformat(str(value).strip()).date()
    return None


def arrow_type(value: Value) -> Any:
    """Return the type of the column whose first value this is."""
    import pyarrow as pa

    match value:
        case bool():
            return pa.bool_()
        case float():
            return pa.float64()
        case datetime():
            return pa.timestamp("us")
        case date():
            return pa.date32()
        case list():
            return pa.list_(pa.string())
    return pa.string()


def new_columns(known: Sequence[str], rows: Iterable[Mapping[str, Value]]) -> dict[str, Any]:
    """Return the columns that rows bring, with their types; no more than a table may have."""
    found: dict[str, Any] = {}
    room = _MAX_COLUMNS - len(known)
    for row in rows:
        for name, value in row.items():
            if name not in known and name not in found and len(found) < room:
                found[name] = arrow_type(value)
    return found


def to_column(values: Sequence[Value | None], kind: Any) -> Any:
    """Return values as an Arrow column of a type; null, where one does not fit."""
    import pyarrow as pa

    return pa.array([value if value is not None and fits(value, kind) else None for value in values], kind)


def fits(value: Value, kind: Any) -> bool:
    """Whether a value is of a column's type."""
    return bool(arrow_type(value) == kind)


def describe_type(kind: Any) -> str:
    """Return the word for a column's type."""
    names = {
        "string": "text",
        "double": "number",
        "bool": "truth value",
        "date32[day]": "date",
        "timestamp[us]": "time",
    }
    return names.get(str(kind), "list of texts" if str(kind).startswith("list") else str(kind))


class FilterError(ValueError):
    """A filter that is no expression over the columns of metadata, or is none at all."""


@contextlib.contextmanager
def filtering(table: Any, where: str | None) -> Iterator[None]:
    """Search under a filter: raise FilterError, in one line that names the columns, if it is the filter that fails.

    Args:
        table: A table of LanceDB, which plans the filter first and reads no row for that.
        where: An expression over its columns, in SQL: ``lang = 'de' and date > date '2025-01-01'``. None: no filter.
    """
    reason = None if where is None else _outside_of_expressions(where) or _planner_error(table, where)
    if reason is None:
        try:
            yield
            return
        except RuntimeError as error:
            if "applying filter expression" not in str(error):  # of a row's value, such as a text that is no number
                raise
            reason = _short(error)
    columns = {f.name: f.type for f in table.schema if f.name not in ("vector", "words", "version", "ordinal")}
    listed = ", ".join(f"{name} ({describe_type(kind)})" for name, kind in columns.items())
    shown = str(where) if len(str(where)) <= 100 else f"{str(where)[:100]}..."
    raise FilterError(f"the filter {shown!r} cannot be used, {reason}: the columns are {listed}")


def _outside_of_expressions(where: str) -> str | None:
    """What makes a filter more than an expression with known functions, or None."""
    if len(where) > MAX_FILTER_CHARACTERS:
        return f"it has {len(where):,} characters and may have {MAX_FILTER_CHARACTERS:,}"
    if not where.strip():
        return "it is empty"
    bare = _QUOTED.sub("''", where).replace("''", " ")
    if found := _NOT_EXPRESSIONS.search(bare):
        return f"{found[0]} is no part of an expression"
    depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
    if depth:
        return "its parentheses do not match"
    unknown = next((name for name in _CALL.findall(bare) if name.lower() not in _FUNCTIONS), None)
    return None if unknown is None else f"{unknown} is no function that filters may call"


def _planner_error(table: Any, where: str) -> str | None:
    """What LanceDB says of a filter that it cannot plan, or None."""
    try:
        table.search().where(f"({where})").limit(1).explain_plan()
    except (RuntimeError, ValueError) as error:
        return _short(error)
    return None


def _short(error: Exception) -> str:
    """An error's reason without LanceDB's prefixes and the places in its source."""
    text = re.sub(r",? /\S+:\d+:\d+|\s*\(?Valid fields are .*", "", " ".join(str(error).split()))
    for noise in ("Invalid input, ", "Schema error: ", "Error during planning: ", "SELECT 1 FROM t WHERE "):
        text = text.replace(noise, "")
    for prefix in ("Invalid user input: ", "sql parser error: ", "filter expression to batch: "):
        text = text.rpartition(prefix)[2]
    text = text.strip().rstrip(".)")
    if "Date32" in text or "Timestamp" in text:
        text += " (write date '2025-03-01')"
    return text[:200]
