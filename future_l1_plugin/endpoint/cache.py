"""Replies on disk, so that nothing is asked twice."""

import contextlib
import sqlite3
from pathlib import Path

from future_l1_plugin.endpoint.errors import EndpointError

#: Seconds that one process waits for another's write to the cache.
CACHE_BUSY_S = 30.0


class ReplyCache:
    """Replies in an SQLite file, which any number of processes may share.

    A connection lives for one operation: none is carried across a fork or between threads, and against a request to a
    language model the cost is nothing. The journal is SQLite's default, not WAL, because WAL needs memory that all
    processes share, which those on other machines of a cluster (file on a network disk) do not.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EndpointError(f"cache: the folder of {path} cannot be made: {error}. Set another path.") from error
        with self._open():
            pass

    def get(self, key: str) -> str | None:
        with self._open() as connection:
            row = connection.execute("SELECT reply FROM replies WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, model: str, sample_id: str, reply: str) -> None:
        with self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", (key, model, sample_id, reply))

    @contextlib.contextmanager
    def _open(self):
        try:
            # isolation_level=None: every statement is its own transaction.
            with contextlib.closing(
                sqlite3.connect(self._path, timeout=CACHE_BUSY_S, isolation_level=None)
            ) as connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS replies "
                    "(key TEXT PRIMARY KEY, model TEXT, sample_id TEXT, reply TEXT NOT NULL)"
                )
                yield connection
        except sqlite3.OperationalError as error:
            raise EndpointError(
                f"{self._path}: the cache of replies cannot be used ({error}). Check that the folder is writable and "
                "not full and that no process keeps the file locked, or set `cache` to another path."
            ) from error
        except sqlite3.DatabaseError as error:
            raise EndpointError(
                f"{self._path}: expected a cache of replies, an SQLite file, found a broken or foreign file ({error}). "
                "Move it away, and the replies are asked for anew; or set `cache` to another path."
            ) from error
