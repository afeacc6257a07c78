"""execution_match: an answer in SQL is right when running it gives what running the gold SQL gives.

Both results are compared as sets of rows: their order does not count, floats count to four digits,
text without case. SQL runs read-only, one SELECT, within two seconds
(``cowest_dspy.utils.sql.run_query``).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from cowest_dspy.errors import DataError
from cowest_dspy.utils.sql import QueryResult, run_query


def execution_match(example: Any, prediction: Any, trace: object = None) -> float:
    """1.0 when the prediction's SQL gives the rows of the example's, otherwise 0.0.

    Args:
        example: has ``sql``, the gold query, and ``database``, the path of a SQLite file.
        prediction: has ``sql``; None, a missing one, and one that fails score 0.0.
        trace: not used; DSPy passes it.

    Raises:
        DataError: the gold query fails, or there is no such database.
    """
    database, given = str(example.get("database")), getattr(prediction, "sql", None)
    gold = _gold(database, str(example.get("sql")))
    return float(gold.matches(run_query(database, str(given or ""))))


@lru_cache(maxsize=4096)
def _gold(database: str, sql: str) -> QueryResult:
    result = run_query(database, sql)
    if result.error:
        raise DataError(f"The gold query fails ({result.error}): {sql}")
    return result
